"""`gateway-store evidence`: seal the audit log, verify it, and prove from it what happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from agent_gateway_store.cli.context import in_store, read_store, require_no_org, settings_of
from agent_gateway_store.cli.errors import CommandError, ExitCode, file_errors
from agent_gateway_store.cli.output import JsonOption, complain, print_fields, print_json, print_result, say, to_dict
from agent_gateway_store.errors import InvalidEvidenceError

if TYPE_CHECKING:
    from agent_gateway_store.models.evidence import Verification

app = typer.Typer(
    name="evidence", no_args_is_help=True, help="Seal the audit log, verify it, and prove from it what happened."
)

KeyOption = Annotated[
    list[str] | None,
    typer.Option("--key", metavar="VKEY", help="A verifier key, of which one must have signed; may be repeated."),
]


@app.command()
def seal(ctx: typer.Context, json: JsonOption = False) -> None:
    """Give every committed event its place in the log, and make a checkpoint."""
    require_no_org(ctx)
    found = in_store(ctx, lambda store: store.evidence.seal())
    if found is None:
        print_result(None, "There is no event to seal yet.", as_json=json)
        return
    print_result(to_dict(found), f"{found.size:,} events are sealed under the root {found.root_hash}.", as_json=json)


@app.command()
def verify(
    ctx: typer.Context,
    against: Annotated[
        list[Path] | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="A file of checkpoints kept elsewhere, as witness-file writes it; repeatable.",
        ),
    ] = None,
    key: KeyOption = None,
    archive: Annotated[
        list[Path] | None,
        typer.Option(exists=True, file_okay=False, help="An archive of pruned events; repeatable."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar.")] = False,
    json: JsonOption = False,
) -> None:
    """Recompute the log from its events, and compare it with checkpoints kept elsewhere. Exit code 3: they differ."""
    require_no_org(ctx)
    kept = [note for path in against or () for note in _notes(path)]
    shown = sys.stderr.isatty() and not quiet and not json
    keys = _keys(key)
    found = read_store(
        ctx,
        lambda store: store.evidence.verify(against=kept, keys=keys, archive=archive, progress=shown),
        as_json=json,
    )
    _report(found, "The log", as_json=json)


@app.command()
def prove(
    ctx: typer.Context,
    request_id: Annotated[str, typer.Argument(help="Of the call, as the gateway gave it.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File to write: JSON, or C2SP tlog-proof if it ends in .tlog-proof.")
    ],
    overwrite: Annotated[bool, typer.Option(help="Replace what exists.")] = False,
    json: JsonOption = False,
) -> None:
    """Write the evidence of one call: the event, its approval with the votes, and the proof that it is in the log."""
    from agent_gateway_store.storage.files import opened, partial

    evidence = read_store(ctx, lambda store: store.evidence.prove(request_id), as_json=json)
    with file_errors(output):
        text = evidence.to_tlog_proof() if output.suffix == ".tlog-proof" else evidence.to_json()
        with partial(output, overwrite=overwrite) as written, opened(written, None) as write:
            write(text.encode())
    size = evidence.checkpoint.size if evidence.checkpoint else 0
    is_sealed = evidence.checkpoint is not None
    place = f"position {evidence.position:,} in a log of {size:,} events" if is_sealed else "not sealed yet"
    print_result(
        {"path": str(output), "position": evidence.position, "size": size}, f"{output}: {place}.", as_json=json
    )
    if not is_sealed:
        complain("Nothing proves it: run `gateway-store evidence seal`, and then this command again.")
    elif evidence.salt is None:
        complain("The event was erased: nothing proves what is left of it.")


@app.command()
def publish(
    ctx: typer.Context,
    folder: Annotated[Path, typer.Argument(file_okay=False, help="Folder of a web server; made if it is missing.")],
    json: JsonOption = False,
) -> None:
    """Write checkpoint and hash tiles, by which monitors verify the log. No event is among them."""
    require_no_org(ctx)
    found = in_store(ctx, lambda store: store.evidence.publish(folder))
    if found is None:
        print_result(None, "Nothing is sealed yet, so nothing was written.", as_json=json)
        return
    facts = {"path": str(folder), **to_dict(found)}
    print_result(facts, f"{folder} holds {found.origin} at {found.size:,} events.", as_json=json)


@app.command()
def keygen(
    ctx: typer.Context,
    name: Annotated[str | None, typer.Option(help="Name of the key; default: AUDIT_LOG_ORIGIN.")] = None,
    json: JsonOption = False,
) -> None:
    """Make a pair of keys: the secret for AUDIT_SIGNING_KEY, and the verifier key (vkey) for everybody else."""
    from agent_gateway_store.evidence.notes import SigningKey

    try:
        key = SigningKey.generate(name or settings_of(ctx).audit_log_origin)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from None
    facts = {"AUDIT_SIGNING_KEY": key.to_text(), "verifier_key": str(key.verifier)}
    if json:
        print_json(facts)
        return
    print_fields(facts)
    complain("Keep the first where only the gateway reads it, and give the second to those who verify.")


@app.command()
def check(
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="As `evidence prove` wrote it.")],
    key: KeyOption = None,
    origin: Annotated[
        str | None, typer.Option(help="Name of the log that it must be of, as `evidence verify` shows it.")
    ] = None,
    json: JsonOption = False,
) -> None:
    """Check the evidence of one call. Needs no database. Exit code 3: it proves nothing, or not what it says."""
    from agent_gateway_store.evidence import check as check_text

    text = file.read_bytes().decode("utf-8", "surrogateescape")
    _report(check_text(text, keys=_keys(key), origin=origin), "The evidence", as_json=json)


def _keys(given: list[str] | None) -> list[str]:
    from agent_gateway_store.evidence.notes import VerifierKey

    try:
        return [str(VerifierKey.parse(each)) for each in given or ()]
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--key") from None


def _notes(path: Path) -> list[str]:
    from agent_gateway_store.evidence.notes import parse_note, split_notes

    notes = split_notes(path.read_bytes().decode("utf-8", "surrogateescape"))
    try:
        for note in notes:
            parse_note(note)
    except InvalidEvidenceError as exc:
        raise CommandError(f"{path}: {exc}", ExitCode.INTEGRITY) from exc
    if not notes:
        raise CommandError(f"{path} holds no checkpoint, so it vouches for nothing.", ExitCode.INTEGRITY)
    return notes


def _report(found: Verification, what: str, *, as_json: bool) -> None:
    """Print what was found; raise for the exit code where it does not fit."""
    if as_json:
        print_json(to_dict(found))
    else:
        anchored = f"up to {found.anchored:,} events" if found.anchored else "by nothing outside of the database"
        counts = {name: f"{getattr(found, name):,}" for name in ("checked", "unsealed", "erased", "pruned", "archived")}
        print_fields(
            {"integrity": "ok" if found.ok else "does not fit", "vouched for": anchored}
            | {"log": found.origin or "no checkpoint", "size": f"{found.size:,}", "root": found.root_hash}
            | counts
        )
        for finding in found.findings:
            where = "" if finding.position is None else f" at {finding.position}"
            request = "" if finding.request_id is None else f" ({finding.request_id})"
            say(f"{finding.kind}{where}{request}: {finding.text}")
        for remark in found.remarks:
            say(remark)
    if not found.ok:
        raise CommandError(f"{what} does not verify.", ExitCode.INTEGRITY)
