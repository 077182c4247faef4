"""The world of `demo --events`: which callers use which tools, what the policy says, who approves, which incidents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from random import Random
from typing import Any

from agent_gateway_store.models.keys import TrustLevel

# Weights of the 24 hours of a day, made up.
Hours = tuple[float, ...]
OFFICE: Hours = (*[0.03] * 6, 0.15, 0.5, 1.0, 1.6, 1.8, 1.5, 0.9, 1.4, 1.7, 1.6, 1.2, 0.7, 0.3, 0.15, 0.1, *[0.05] * 3)
ROUND_THE_CLOCK: Hours = (*[0.7] * 6, *[1.0] * 14, *[0.8] * 4)
NIGHTLY: Hours = (0.0, 0.4, 4.0, 3.0, 0.6, *[0.05] * 17, 0.1, 0.0)


@dataclass(frozen=True)
class Caller:
    """An agent and its habits: its share of all calls, and the weights of hours (UTC), of weekend days and of tools."""

    name: str
    role: str
    trust: TrustLevel
    environment: str
    share: float
    hours: Hours
    weekend: float
    tools: dict[str, float]


@dataclass(frozen=True)
class Tool:
    """A tool, how long it takes, how often it fails, and what the policy says about it.

    Latencies are lognormal: their median, and the sigma of their logarithm, `spread`. `fails`, `asks`, `denied`,
    `cleaned` and the values of `labels` are shares of the calls; `arguments` makes sanitised ones.
    """

    server: str
    name: str
    median_ms: float
    spread: float
    fails: float
    risk: float
    rule: str
    arguments: Callable[[Random], dict[str, Any]]
    labels: dict[str, float] = field(default_factory=dict)
    asks: float = 0.0
    denied: float = 0.0
    cleaned: float = 0.0

    @property
    def full_name(self) -> str:
        """Server and tool."""
        return f"{self.server}.{self.name}"


@dataclass(frozen=True)
class Incident:
    """An incident: it began on the latest day on which its hour (UTC) was at least `age` before the end."""

    hour: int
    age: timedelta
    length: timedelta

    def start(self, end: datetime) -> datetime:
        """Return when it began in the history that ends at `end`."""
        latest = end - self.age
        start = latest.replace(hour=self.hour, minute=0, second=0, microsecond=0)
        return start if start <= latest else start - timedelta(days=1)


def _pick(*words: str) -> Callable[[Random], str]:
    return lambda random: random.choice(words)


_repo = _pick("shop-web", "shop-api", "infra", "data-models", "mobile-app")
_file = _pick(
    "src/cart.py", "src/checkout.py", "README.md", "tests/test_cart.py", "deploy/values.yaml", "notes/plan.md"
)
_table = _pick("orders", "customers", "invoices", "shipments", "sessions")
_channel = _pick("#releases", "#support", "#incidents", "#data")
_site = _pick("docs.python.org/3", "status.example.com", "blog.example.org/post/81", "wiki.example.com/Returns")
_service = _pick("checkout", "catalogue", "search", "mailer")


def _query(random: Random) -> dict[str, Any]:
    table = _table(random)
    return {
        # Only shown, and never run.
        "sql": f"SELECT * FROM {table} WHERE created_at > $1 LIMIT $2",  # noqa: S608
        "parameters": ["2026-01-01", random.choice((50, 500, 5000))],
    }


TOOLS: dict[str, Tool] = {
    tool.full_name: tool
    for tool in (
        Tool("files", "read_file", 11, 0.5, 0.01, 0.08, "reads-are-allowed", lambda r: {"path": _file(r)}),
        Tool("files", "list_files", 7, 0.4, 0.002, 0.03, "reads-are-allowed", lambda r: {"path": "src"}),
        Tool(
            *("files", "write_file", 24, 0.6, 0.02, 0.32, "writes-in-the-workspace"),
            lambda r: {"path": _file(r), "bytes": r.randrange(200, 40_000)},
            labels={"FILE_WRITE": 1.0},
            denied=0.01,
        ),
        Tool(
            *("files", "delete_file", 15, 0.5, 0.01, 0.66, "deletions-need-approval"),
            lambda r: {"path": _file(r)},
            labels={"DESTRUCTIVE": 1.0},
            asks=0.85,
            denied=0.05,
        ),
        Tool(
            *("github", "search_code", 310, 0.5, 0.015, 0.06, "reads-are-allowed"),
            lambda r: {"repository": _repo(r), "query": r.choice(("def total", "TODO", "timeout", "class Cart"))},
        ),
        Tool(
            *("github", "create_pull_request", 880, 0.4, 0.02, 0.3, "pull-requests-are-allowed"),
            lambda r: {
                "repository": _repo(r),
                "title": r.choice(("Fix rounding", "Bump pins", "Add retry")),
                "files": 3,
            },
            labels={"CODE_CHANGE": 1.0},
        ),
        Tool(
            *("github", "merge_pull_request", 1_150, 0.35, 0.02, 0.71, "merges-need-approval"),
            lambda r: {"repository": _repo(r), "number": r.randrange(100, 999)},
            labels={"CODE_CHANGE": 1.0, "PRODUCTION": 0.5},
            asks=0.7,
            denied=0.03,
        ),
        Tool(
            *("postgres", "run_query", 64, 1.0, 0.02, 0.27, "queries-are-read-only"),
            _query,
            labels={"PERSONAL_DATA": 0.22},
            denied=0.012,
            cleaned=0.06,
        ),
        Tool("postgres", "explain_query", 21, 0.6, 0.01, 0.05, "reads-are-allowed", _query),
        Tool(
            *("slack", "post_message", 240, 0.4, 0.01, 0.22, "messages-inside-the-company"),
            lambda r: {"channel": _channel(r), "text": r.choice(("Deployed.", "Report is ready.", "Looking into it."))},
            labels={"EXTERNAL_MESSAGE": 0.08},
        ),
        Tool(
            *("mail", "send_email", 520, 0.5, 0.02, 0.48, "mail-to-customers"),
            lambda r: {"to": "***@example.com", "template": r.choice(("order-delayed", "refund-done", "survey"))},
            labels={"EXTERNAL_MESSAGE": 1.0, "PERSONAL_DATA": 0.4},
            asks=0.06,
            denied=0.02,
            cleaned=0.14,
        ),
        Tool(
            *("web", "fetch_url", 640, 0.9, 0.05, 0.3, "web-by-allow-list"),
            lambda r: {"url": f"https://{_site(r)}"},
            labels={"UNTRUSTED_CONTENT": 1.0, "PROMPT_INJECTION": 0.03},
            denied=0.03,
            cleaned=0.05,
        ),
        Tool("web", "search", 430, 0.5, 0.02, 0.12, "web-by-allow-list", lambda r: {"query": "returns policy EU"}),
        Tool(
            *("payments", "get_invoice", 95, 0.5, 0.01, 0.2, "reads-are-allowed"),
            lambda r: {"invoice": f"INV-{r.randrange(10_000, 99_999)}"},
            labels={"FINANCIAL": 1.0},
        ),
        Tool(
            *("payments", "refund_payment", 760, 0.4, 0.02, 0.82, "refunds-need-approval"),
            lambda r: {"payment": f"pay_{r.randrange(10**6):06}", "amount_eur": round(r.lognormvariate(3.6, 0.9), 2)},
            labels={"FINANCIAL": 1.0, "IRREVERSIBLE": 1.0},
            asks=0.9,
            denied=0.06,
        ),
        Tool("kubernetes", "get_pods", 130, 0.4, 0.01, 0.07, "reads-are-allowed", lambda r: {"namespace": _service(r)}),
        Tool(
            *("kubernetes", "restart_deployment", 2_400, 0.4, 0.04, 0.74, "production-changes-need-approval"),
            lambda r: {"deployment": _service(r), "namespace": "production"},
            labels={"PRODUCTION": 1.0, "DESTRUCTIVE": 0.3},
            asks=0.6,
            denied=0.04,
        ),
        Tool(
            *("vault", "read_secret", 35, 0.4, 0.005, 0.93, "secrets-are-denied"),
            lambda r: {"path": f"kv/{_service(r)}/***"},
            labels={"CREDENTIAL_ACCESS": 1.0},
            denied=0.9,
        ),
        Tool(
            *("crm", "find_customer", 75, 0.5, 0.01, 0.24, "customer-reads"),
            lambda r: {"email": "***", "fields": ["name", "orders"]},
            labels={"PERSONAL_DATA": 1.0},
            cleaned=0.2,
        ),
        Tool(
            *("crm", "export_contacts", 3_100, 0.5, 0.03, 0.79, "exports-are-allowed"),
            lambda r: {"segment": r.choice(("newsletter", "dormant", "vip")), "format": "csv"},
            labels={"PERSONAL_DATA": 1.0, "BULK_EXPORT": 1.0},
        ),
    )
}

TROUBLEMAKER = "vendor-trial-agent"
CALLERS: tuple[Caller, ...] = (
    Caller(
        *("coding-agent", "developer", TrustLevel.MEDIUM, "dev", 0.34, OFFICE, 0.1),
        {"files.read_file": 30, "files.list_files": 14, "files.write_file": 14, "files.delete_file": 1.2}
        | {"github.search_code": 12, "github.create_pull_request": 3, "postgres.explain_query": 3, "web.search": 3},
    ),
    Caller(
        *("support-agent", "support", TrustLevel.MEDIUM, "prod", 0.2, OFFICE, 0.6),
        {"crm.find_customer": 30, "payments.get_invoice": 10, "mail.send_email": 9, "slack.post_message": 4}
        | {"payments.refund_payment": 1.6, "web.search": 3, "crm.export_contacts": 0.25},
    ),
    Caller(
        *("research-agent", "analyst", TrustLevel.LOW, "prod", 0.14, OFFICE, 0.2),
        {"web.fetch_url": 24, "web.search": 12, "postgres.run_query": 10, "files.write_file": 3},
    ),
    Caller(
        *("reporting-agent", "analyst", TrustLevel.MEDIUM, "prod", 0.12, NIGHTLY, 1.0),
        {"postgres.run_query": 30, "files.write_file": 4, "mail.send_email": 1.5, "crm.export_contacts": 0.5},
    ),
    Caller(
        *("oncall-agent", "operator", TrustLevel.HIGH, "prod", 0.1, ROUND_THE_CLOCK, 1.0),
        {"kubernetes.get_pods": 30, "postgres.explain_query": 4, "slack.post_message": 5}
        | {"kubernetes.restart_deployment": 1.2, "vault.read_secret": 0.3},
    ),
    Caller(
        *("release-bot", "release", TrustLevel.HIGH, "ci", 0.07, OFFICE, 0.05),
        {"github.search_code": 6, "github.create_pull_request": 5, "github.merge_pull_request": 3}
        | {"slack.post_message": 4, "kubernetes.get_pods": 6, "kubernetes.restart_deployment": 0.8},
    ),
    Caller(
        *(TROUBLEMAKER, "partner", TrustLevel.UNTRUSTED, "staging", 0.03, OFFICE, 0.1),
        {"web.fetch_url": 10, "files.read_file": 10, "crm.find_customer": 5, "vault.read_secret": 1.5},
    ),
)
APPROVERS: tuple[tuple[str, float], ...] = (("alice", 5), ("bob", 3), ("chandra", 2))
# What the troublemaker tries in its half-hour of probing: tool, arguments, rule, label.
PROBES: tuple[tuple[str, dict[str, Any], str, str], ...] = (
    ("vault.read_secret", {"path": "kv/checkout/***"}, "secrets-are-denied", "CREDENTIAL_ACCESS"),
    ("files.read_file", {"path": "../../../../etc/passwd"}, "paths-stay-inside", "PATH_TRAVERSAL"),
    ("files.read_file", {"path": "/root/.ssh/***"}, "paths-stay-inside", "PATH_TRAVERSAL"),
    ("postgres.run_query", {"sql": "SELECT * FROM pg_shadow"}, "queries-are-read-only", "CREDENTIAL_ACCESS"),
    ("crm.export_contacts", {"segment": "all", "format": "csv"}, "exports-need-approval", "BULK_EXPORT"),
)
PROBED = Incident(hour=10, age=timedelta(days=1), length=timedelta(minutes=30))
# During the nightly batch of this caller, since at other hours there are too few queries to see it.
SLOWED = "reporting-agent"
SLOW = Incident(hour=2, age=timedelta(days=3), length=timedelta(minutes=90))
# The thief of the release bot's key looks for more of them, by night and from outside the company.
LEAKED, THIEF_ADDRESS = "release-bot", "203.0.113.77"
SOUGHT: tuple[str, ...] = ("password", "BEGIN PRIVATE KEY", "aws_secret_access_key")
STOLEN = Incident(hour=3, age=timedelta(days=2), length=timedelta(minutes=40))


def address(caller: str) -> str:
    """Return the address inside the company from which this agent calls."""
    return f"10.20.0.{10 + [each.name for each in CALLERS].index(caller)}"
