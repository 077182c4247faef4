"""`GatewayStore`: the whole store behind one name. Wires the services; holds no query."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping
from contextlib import AsyncExitStack
from functools import cached_property
from types import TracebackType
from typing import Any, NoReturn, Self
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine

from agent_gateway_store import telemetry
from agent_gateway_store._concurrency import BackgroundTasks, Claim, SingleFlight, loop_here, require_native_threads
from agent_gateway_store.approval import ApprovalBackend, ApprovalManager
from agent_gateway_store.approval.cache import ApprovalCache
from agent_gateway_store.approval.queries import ApprovalRef
from agent_gateway_store.approval.reports import decision_hash
from agent_gateway_store.approval.waiting import Waiting
from agent_gateway_store.audit import AuditManager
from agent_gateway_store.audit.backends import backend_for
from agent_gateway_store.audit.hooks import AfterWriteHooks, BeforeWriteHooks
from agent_gateway_store.audit.spool import Spool
from agent_gateway_store.audit.writer import AuditWriter, OpenWriter
from agent_gateway_store.delivery import NotificationManager, StoreOutbox
from agent_gateway_store.encoding.sanitize import storable_key
from agent_gateway_store.evidence.manager import CheckpointHooks, EvidenceManager
from agent_gateway_store.evidence.notes import SigningKey
from agent_gateway_store.evidence.sealer import BackgroundSealer, Sealer
from agent_gateway_store.figures import Figures
from agent_gateway_store.hooks.dispatch import Dispatcher, Vetoes
from agent_gateway_store.hooks.executor import PluginExecutor
from agent_gateway_store.hooks.manager import Plugins
from agent_gateway_store.keys import KeyManager
from agent_gateway_store.keys.cache import KeyCache
from agent_gateway_store.keys.hashing import Hasher
from agent_gateway_store.models.audit import AuditEvent
from agent_gateway_store.retention import RetentionManager
from agent_gateway_store.retention.manager import retention_lock
from agent_gateway_store.settings import StoreSettings
from agent_gateway_store.shipping import Shipper, SinkManager
from agent_gateway_store.storage import migrate
from agent_gateway_store.storage.cache import RedisClient, create_redis
from agent_gateway_store.storage.database import Database, create_engine
from agent_gateway_store.storage.identity import check_replica, is_standby, read_identity
from agent_gateway_store.storage.pubsub import PubSub
from agent_gateway_store.storage.redis_cache import RedisCache
from agent_gateway_store.storage.urls import is_memory

# Chosen: as long as `close` waits for other transactions.
_LAST_WITHDRAWALS_S = 5.0
# What is not sealed then is sealed by the next store that opens.
_LAST_SEAL_S = 1.0
# Two commit audit events, and one listens.
_OWN_CONNECTIONS = 3


class GatewayStore:
    """The memory of a gateway: `store.audit`, `store.approvals`, `store.keys`.

    One store per process and event loop: used after a fork or from another loop it raises StoreNotOpenError.
    Constructing connects nothing; `async with` or `open` does.

    Args:
        database_url: Default: the setting DATABASE_URL, else the SQLite file `gateway.db` in the current folder.
        redis_url: Default: the setting REDIS_URL; "" does without.
        settings: Default: from the environment.
        engine: An engine of the caller's in place of a URL, of asyncpg or aiosqlite; it is not disposed of.
        redis: A client of the caller's in place of a URL; it is not closed.
        plugins: Plugins or notifiers besides the installed ones.
        auto_migrate: None sets up an empty SQLite database and nothing else; True brings any schema up to date;
            False changes no schema.

    Raises:
        InvalidUrlError: A URL that cannot be used as it stands.
        TypeError: `engine` is not an AsyncEngine.
        ValueError: The store cannot do all its work on this engine: the sentence says what to give in its place.
    """

    def __init__(
        self,
        database_url: str | None = None,
        *,
        redis_url: str | None = None,
        settings: StoreSettings | None = None,
        engine: AsyncEngine | None = None,
        redis: RedisClient | None = None,
        plugins: Iterable[object] = (),
        auto_migrate: bool | None = None,
    ) -> None:
        settings = settings or StoreSettings()
        url = database_url if database_url is not None else settings.database_url
        # The engine has as many again at a peak, and as many as both are used without SQLAlchemy.
        pool_size = (settings.database_pool_size - _OWN_CONNECTIONS) // 4
        read_url, replica = settings.database_read_url, None
        if read_url:
            replica = Database(create_engine(read_url, pool_size=pool_size, reads=True), owned=True, url=read_url)
        if engine is not None:
            database = Database(engine, owned=False, replica=replica)
        else:
            database = Database(create_engine(url, pool_size=pool_size), owned=True, url=url, replica=replica)
        core = _Core(
            settings,
            database,
            redis_url if redis_url is not None else settings.redis_url,
            redis,
            tuple(plugins),
            auto_migrate,
        )
        self._bind(core, None)

    def __reduce__(self) -> NoReturn:
        raise TypeError("A store cannot be pickled: make one in each process.")

    def _bind(self, core: _Core, org_id: str | None) -> None:
        self._core, self._org_id, self.settings = core, org_id, core.settings
        shipper = Shipper(core.database, lambda: core.plugins.sinks(core.settings), core.executor, org_id=org_id)
        self._sinks = SinkManager(core.database, org_id=org_id)
        self._audit = AuditManager(
            core.database,
            core.writer,
            org_id=org_id,
            before=core.before_write,
            after=core.after_write,
            hash_args=self.hash_args,
            hash_approval=lambda approval_id: decision_hash(core.database, ApprovalRef.by_id(approval_id, org_id)),
            ship=shipper.ship,
        )
        self._approvals = ApprovalManager(core.approvals, org_id=org_id)
        self._keys = KeyManager(core.database, core.hasher, core.key_cache, core.settings, org_id=org_id)
        self._notifications = NotificationManager(core.database, core.outbox, org_id=org_id)
        self._evidence = EvidenceManager(core.database, core.sealer, core.settings, org_id=org_id)
        self._retention = RetentionManager(
            core.database, core.sealer, core.retention_lock, core.settings, forget=core.forget_approvals, org_id=org_id
        )

    @property
    def audit(self) -> AuditManager:
        """Write and find audit events."""
        return self._audit

    @property
    def approvals(self) -> ApprovalManager:
        """Ask for approvals, decide them, use them."""
        return self._approvals

    @property
    def keys(self) -> KeyManager:
        """Issue and verify API keys."""
        return self._keys

    @property
    def evidence(self) -> EvidenceManager:
        """Seal the audit log, verify it, and prove from it what happened."""
        return self._evidence

    @property
    def retention(self) -> RetentionManager:
        """What is kept and for how long: holds, pruning into an archive, erasing."""
        return self._retention

    @property
    def notifications(self) -> NotificationManager:
        """The notices that notifiers received, and those that they have still to receive."""
        return self._notifications

    @property
    def sinks(self) -> SinkManager:
        """The sinks to which `audit.ship` has shipped: how far they are, and what they have refused."""
        return self._sinks

    @property
    def plugins(self) -> Plugins:
        """The plugins as they were loaded, with what is wrong with them."""
        return self._core.plugins

    @property
    def database(self) -> Database:
        """The engine and the sessions; `store.database.sessions()` opens a session for `record`."""
        return self._core.database

    @property
    def org_id(self) -> str | None:
        """The organisation this store is bound to, or None."""
        return self._org_id

    def for_org(self, org_id: str) -> GatewayStore:
        """Return the same store bound to one organisation: it stamps it on what it writes and sees nothing else.

        Both share everything; either's `close` closes both.

        Raises:
            ValueError: `org_id` is empty.
        """
        if not org_id:
            raise ValueError("org_id must not be empty.")
        return _OrganisationView(self._core, storable_key(org_id))

    async def open(self) -> Self:
        """Connect and check the schema. A second call does nothing.

        Raises:
            StoreNotOpenError: It is open elsewhere, or no asyncio runs here, or gevent or eventlet has patched Python.
            StoreUnavailableError: The database cannot be reached; the text says what to check.
            InvalidUrlError: DATABASE_READ_URL leads to another database.
            SchemaOutOfDateError: The schema is not the one this package works on; the text names the command to run.
        """
        await self._core.open()
        return self

    async def close(self) -> None:
        """Let notices under way arrive, then close what the store opened itself. A second call does nothing.

        It waits for them PLUGIN_TIMEOUT_SECONDS and a second at most; the rest stays in the outbox and is sent later. A
        closed store can be opened again.

        Raises:
            StoreNotOpenError: The store is open in another process or event loop, which must close it.
        """
        await self._core.close()

    async def migrate(self) -> None:
        """Bring the schema up to date. Any number of processes may call this at once; works before `open`, too.

        Raises:
            StoreNotOpenError: The store is open in another process or event loop.
            StoreUnavailableError: The database cannot be reached, or changed; the text says what to check.
        """
        await self._core.migrate()

    async def ping(self) -> None:
        """Return if the database answers, and takes writes. For health checks.

        Raises:
            StoreUnavailableError: It does not.
            StoreNotOpenError: The store is not open here.
        """
        await self._core.database.ping()

    def hash_args(self, args: Mapping[str, Any]) -> str:
        """Return `raw_args_hash` for the raw arguments of a call, under this store's setting HASH_KEY.

        See `AuditEvent.hash_args`.
        """
        key = self.settings.hash_key
        return AuditEvent.hash_args(args, key=key.get_secret_value() if key else None)

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()


class _OrganisationView(GatewayStore):
    """An open or closed store seen from one organisation."""

    def __init__(self, core: _Core, org_id: str) -> None:
        self._bind(core, org_id)


class _Core:
    """What a store and its organisation-bound views share."""

    def __init__(
        self,
        settings: StoreSettings,
        database: Database,
        redis_url: str | None,
        redis: RedisClient | None,
        plugins: tuple[object, ...],
        auto_migrate: bool | None,
    ) -> None:
        self.settings = settings
        self.database = database
        self._own_redis = (
            create_redis(redis_url, timeout_s=settings.redis_timeout_seconds) if redis is None and redis_url else None
        )
        self.redis = RedisCache(redis or self._own_redis, timeout_s=settings.redis_timeout_seconds)
        self.pubsub = PubSub(self.redis, database)
        waiting = Waiting(self.pubsub, trust_s=settings.approval_cache_seconds)
        self.hasher = Hasher(rounds=settings.bcrypt_rounds)
        self.key_cache = KeyCache(
            self.hasher,
            trusted_s=settings.api_key_cache_seconds,
            pubsub=self.pubsub,
            check_owner=database.check_owner,
        )
        self.executor = PluginExecutor(settings.plugin_timeout_seconds)
        self.vetoes = Vetoes(lambda: self.plugins, self.executor)
        self.before_write = BeforeWriteHooks(lambda: self.plugins, self.executor)
        self.after_write = AfterWriteHooks(lambda: self.plugins, self.executor)
        self.writer = OpenWriter(database.check_owner, strict=settings.audit_mode == "strict")
        self.outbox = StoreOutbox(database, settings)
        self._asking = BackgroundTasks()
        self.approvals = ApprovalBackend(
            database, self.redis, settings, self.outbox, self.vetoes, waiting, self._asking
        )
        self.checkpoint_hooks = CheckpointHooks(lambda: self.plugins, self.executor)
        signing_key = settings.audit_signing_key
        self.sealer = Sealer(
            database,
            origin=settings.audit_log_origin,
            signer=SigningKey.parse(signing_key.get_secret_value()) if signing_key else None,
            publish=self.checkpoint_hooks.notify,
        )
        self.retention_lock = retention_lock(database)
        self.background_sealer = BackgroundSealer(
            self.sealer, every_s=settings.audit_seal_seconds, has_written=lambda: self.writer.has_written
        )
        self.figures = Figures(
            self.writer,
            database,
            self.redis,
            NotificationManager(database, self.outbox),
            SinkManager(database),
            settings,
        )
        self._given_plugins = plugins
        self._auto_migrate = auto_migrate
        self._opening: SingleFlight[None] = SingleFlight()
        self._claim = Claim(lambda: self.outbox.is_open)

    async def forget_approvals(self, approval_ids: Collection[UUID]) -> bool:
        if self.redis.client is None or not approval_ids:
            return True
        return await ApprovalCache(self.redis, trust_s=self.settings.approval_cache_seconds).forget(approval_ids)

    @cached_property
    def plugins(self) -> Plugins:
        return Plugins(self._given_plugins)

    async def open(self) -> None:
        if not self._is_open_here():
            require_native_threads()
            # Tasks that open it at once share the work, which ends with the last of them that is cancelled.
            await self._opening.run(loop_here(), self._open_claimed)

    async def _open_claimed(self) -> None:
        with self._claim:
            await self._open()

    async def _open(self) -> None:
        try:
            await self._prepare_schema()
            identity = await read_identity(self.database.engine)
            dispatcher = Dispatcher(self.plugins, self.settings, self.executor)
            notifiers = await dispatcher.open()
            notify = self.after_write.notify if self.after_write.is_wanted else None
            spool = Spool(self.settings.audit_spool_path, self.database.engine.url, identity)
            on_standby = await is_standby(self.database.engine)
            backend = backend_for(self.database.engine)
            strict = self.writer.is_strict
            writer = AuditWriter(backend, spool, strict=strict, notify=notify, on_standby=on_standby)
            if self.settings.otel_enabled:
                telemetry.enable(self.figures)
            self.database.bind_to_loop()
            await check_replica(self.database, identity)
            self.writer.writer = writer
            self.before_write.withheld = self.after_write.unnotified = 0
            for part in (self.key_cache, self.redis, self.sealer, self.retention_lock):
                part.open()
            await writer.open()
            # Last: from now on the store counts as open.
            self.outbox.open(dispatcher, notifiers)
        except BaseException:
            await self.close()
            raise
        self.background_sealer.start()
        if self.settings.otel_enabled:
            self.figures.start()
        if self.settings.freeze_after_open:
            # First collected, because circles that are frozen are never freed.
            gc.collect()
            gc.freeze()

    def _is_open_here(self) -> bool:
        """True if open; raises StoreNotOpenError if that was done in another process or event loop."""
        if self.outbox.is_open:
            self.database.check_owner()
        return self.outbox.is_open

    async def migrate(self) -> None:
        if self._is_open_here():
            await migrate.upgrade(self.database.engine)
            return
        require_native_threads()
        with self._claim:
            try:
                await migrate.upgrade(self.database.engine)
            finally:
                if not (is_memory(self.database.engine.url) or self._claim.is_shared):
                    # Its connections belong to this event loop; the store may be opened in another one.
                    await self.database.close()

    async def _prepare_schema(self) -> None:
        engine = self.database.engine
        fresh = self._auto_migrate is None and self.database.dialect == "sqlite" and await migrate.is_empty(engine)
        if self._auto_migrate or fresh:
            await migrate.upgrade(engine)
        await migrate.require_current(engine)

    async def close(self) -> None:
        self._is_open_here()
        # Each step runs whatever becomes of those before it.
        async with AsyncExitStack() as steps:
            steps.enter_context(self._claim)
            if self._own_redis is not None:
                steps.push_async_callback(self._own_redis.aclose)
            steps.push_async_callback(self.redis.join)
            # Tasks that still wait for a decision read once more, and find the store closed.
            steps.callback(self.pubsub.notify_all)
            steps.push_async_callback(self.database.close)
            steps.push_async_callback(self.hasher.close)
            steps.push_async_callback(self.executor.aclose)
            steps.push_async_callback(self.outbox.close)
            if self.writer.writer is not None:
                writer, self.writer.writer = self.writer.writer, None
                steps.push_async_callback(self.after_write.close)
                steps.push_async_callback(writer.close)
                steps.push_async_callback(self.before_write.tasks.join)
            steps.push_async_callback(self.pubsub.close)
            steps.push_async_callback(self.key_cache.close)
            steps.push_async_callback(self.checkpoint_hooks.close)
            steps.push_async_callback(self.background_sealer.stop, _LAST_SEAL_S)
            steps.push_async_callback(self.figures.close)
            steps.push_async_callback(self._asking.join, _LAST_WITHDRAWALS_S)


def parts_of(store: GatewayStore) -> _Core:
    """Return what a store is made of, which its organisation-bound views share: for tests and benchmarks only."""
    return store._core
