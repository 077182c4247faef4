"""Hooks: add a command."""

# --8<-- [start:plugin]
import typer

from agent_gateway_store import hookimpl
from agent_gateway_store.cli.context import open_store, run


@hookimpl
def gateway_store_register_commands(app):
    @app.command("pending-count")
    def pending_count(ctx: typer.Context):
        """Print how many approvals wait, for a status line."""

        async def count() -> int:
            async with open_store(ctx) as store:  # honours --database-url, --org and the other global options
                return len(await store.approvals.list_requests("PENDING", limit=1000))

        print(run(count()))


# --8<-- [end:plugin]


from typer.testing import CliRunner

app = typer.Typer()
app.callback()(lambda: None)
gateway_store_register_commands(app)
assert CliRunner().invoke(app, ["pending-count"]).stdout == "0\n"
