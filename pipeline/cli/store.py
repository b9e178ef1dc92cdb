"""`pipeline store …`: look after a store and share it."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from pipeline.cli.command import command, say
from pipeline.command_lines import quoted, store_command
from pipeline.lookup.store_folder import store_place as place
from pipeline.store.errors import StoreError, UserError

if TYPE_CHECKING:
    from pipeline.store import Store

_STORE = click.option(
    "--store",
    "where",
    default="",
    metavar="PLACE",
    help="A folder, s3://BUCKET/FOLDER or https://HOST/FOLDER. Default: $PIPELINE_STORE, else ./activations.",
)


@click.group()
def store() -> None:
    """Look after a store and share it."""


def _open(where: str) -> Store:
    from pipeline.store import Store

    return Store.open(place(where))


def seconds(text: str) -> float:
    """ "7d", "12h", "30m", "45s" → seconds. UserError otherwise."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([smhdw]?)", text.strip())
    if match is None:
        raise UserError(f"--older-than {text}: expected a time such as 12h or 7d")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}[match[2]]


@store.command(short_help="Spaces, tasks, samples, bytes, who and when.")
@_STORE
@command
def status(as_json: bool, where: str) -> tuple[Any, str]:
    """What a store holds: spaces, tasks, samples, bytes, who and when, licence."""
    from pipeline.cli.store_report import status_text, status_what

    what = status_what(_open(where))
    return what, status_text(what)


@store.command()
@_STORE
@click.option("--deep", is_flag=True, help="Read every byte and check its digest, not only names and sizes.")
@click.option("--recompute", type=int, default=0, metavar="K", help="Run the backbone on K random samples and compare.")
@click.option("--model", default="", metavar="NAME", help="For --recompute: the checkpoint, or SLOT=NAME,…")
@click.option(
    "--data", multiple=True, metavar="FOLDER", help="For --recompute of images: where their names begin; repeatable."
)
@command
def verify(as_json: bool, where: str, deep: bool, recompute: int, model: str, data: tuple[str, ...]) -> tuple[Any, str]:
    """Check a store; changes nothing. Exit status 1 if something is wrong."""
    from pipeline.store import Store

    opened = Store(_open(where).files.fresh())  # what is computed again, too, is compared with what is there
    found = [asdict(p) for p in opened.verify(deep)]
    compared: list[dict[str, Any]] = []
    if recompute:
        from pipeline.commands.recheck import recheck

        compared = recheck(opened, recompute, model, data=data)
        found += [c for c in compared if not c["ok"]]
    if found:
        for problem in found[:50]:
            say("  ".join(str(v) for v in problem.values() if v not in ("", None)))
        raise Problems(f"{len(found)} problems in {opened.where}: {_mending(opened, where)}")
    depth = "every digest" if deep else "names and sizes"
    more = f"; {sum(c['samples'] for c in compared)} samples computed again agree" if compared else ""
    if absent := sum(c["absent"] for c in compared):
        more += f", {absent} passed over: their image is not in --data as it was extracted"
    return {"store": opened.where, "problems": [], "recomputed": compared}, f"{opened.where}: {depth} checked{more}"


def _mending(store: Store, where: str) -> str:
    """What to do about a damaged store. A push alone leaves what is there as it is."""
    mend = f"`{store_command('repair', where)}` puts aside what is damaged"
    if store.files.local:
        return mend
    if place(where).startswith("s3://"):
        bring = f"pipeline store push {quoted(store.where)} --store COPY"
        return f"{mend}, then extract, or push a sound COPY again: `{bring}`"
    return "a mirror is only read: repair the store that it is a mirror of, or pull a sound copy"


class Problems(StoreError):
    """`verify` found something."""

    exit_code = 1


@store.command(short_help="Put aside what is damaged.")
@_STORE
@click.option("--dry-run", is_flag=True, help="Only say what is damaged.")
@command
def repair(as_json: bool, where: str, dry_run: bool) -> tuple[Any, str]:
    """Put aside what is damaged and keep what is sound; extract then fills the hole."""
    from pipeline.store.upkeep.repair import repair as mend

    done = mend(place(where), dry_run)
    lines = ["  ".join(str(v) for v in p.values()) for p in done.problems]
    if not done.problems:
        lines.append("nothing is damaged")
    elif dry_run:
        lines.append(f"{len(done.problems)} damaged; without --dry-run they are put aside")
    else:
        lines.append(
            f"{len(done.moved)} put into quarantine, sound samples in {done.rewritten} new segments; "
            f"{done.lost} samples lost a state: the same extract command fills exactly those"
        )
    return asdict(done), "\n".join(lines)


@store.command(short_help="Write old task tables anew.")
@_STORE
@click.option("--dry-run", is_flag=True, help="Only say what would be written anew.")
@command
def upgrade(as_json: bool, where: str, dry_run: bool) -> tuple[Any, str]:
    """Write task tables of format 1 anew as Parquet; runs find their rows as before."""
    opened = _open(where)
    done, wrong = [], []
    for space in opened.spaces():
        for info, problem in space.upgrade_tables(change=not dry_run):
            done.append(info.path)
            if problem:
                wrong.append(problem)
                say(problem)
    if wrong:
        raise Problems(f"{len(wrong)} of {len(done)} tables were left as they are; the others are done")
    what = "would be written anew" if dry_run else "written anew" if done else "of format 1, there is nothing to do"
    return {"store": opened.where, "tables": done}, f"{opened.where}: {len(done)} tables {what}"


def _transfer(source: str, target: str, space: str, quiet: bool) -> tuple[Any, str]:
    from pipeline.store import Store
    from pipeline.store.progress import Bar
    from pipeline.store.upkeep.transfer import transfer
    from pipeline.terminal import size_text

    begin = Store.open(source)
    spaces = [begin.space(space).id] if space else None
    with Bar(unit="B", unit_scale=True, disable=quiet or None, desc="copy") as bar:

        def progress(name: str, size: int) -> None:
            bar.update(size)

        done = transfer(begin, Store.open(target, create=True), spaces, progress)
    if done.problems:
        for problem in done.problems:
            say(problem)
        raise Problems(f"{len(done.problems)} damaged files were left out, all else was copied; repair {source} first")
    text = f"{done.segments} segments copied, {done.skipped} were there; {size_text(done.bytes)} to {target}"
    if done.skipped:
        check = store_command("verify", target, "--deep")
        text += f"\nwhat was there was not read: `{check}` tells whether it is sound"
    return {"from": source, "to": target, **vars(done)}, text


_SPACE = click.option("--space", default="", metavar="ID", help="Only this feature space, by its first characters.")


@store.command(short_help="Copy what PLACE lacks to it.")
@click.argument("to", metavar="PLACE")
@_STORE
@_SPACE
@command
def push(as_json: bool, to: str, where: str, space: str) -> tuple[Any, str]:
    """Copy what PLACE lacks to it; goes on where it was interrupted."""
    return _transfer(place(where), to, space, as_json)


@store.command(short_help="Copy from PLACE what is not here.")
@click.argument("source", metavar="PLACE")
@_STORE
@_SPACE
@command
def pull(as_json: bool, source: str, where: str, space: str) -> tuple[Any, str]:
    """Copy from PLACE what this store lacks; goes on where it was interrupted."""
    return _transfer(source, place(where), space, as_json)


@store.command(short_help="Add what another store has.")
@click.argument("other", metavar="OTHER")
@_STORE
@command
def merge(as_json: bool, other: str, where: str) -> tuple[Any, str]:
    """Make this store the union of itself and OTHER, which is not changed."""
    return _transfer(other, place(where), "", as_json)


@store.command(short_help="Find and remove what no reader needs.")
@_STORE
@click.option("--older-than", default="1d", show_default=True, metavar="TIME", help="Leave what is younger (7d, 12h).")
@click.option("--delete", is_flag=True, help="Remove it; without, only say what would be.")
@command
def gc(as_json: bool, where: str, older_than: str, delete: bool) -> tuple[Any, str]:
    """Find what no reader needs: unfinished, superseded, in quarantine. Removes nothing without --delete."""
    from pipeline.cli.store_report import garbage_text
    from pipeline.store.upkeep.usage import collect, garbage

    opened = _open(where)
    found = garbage(opened, seconds(older_than))
    if delete:
        collect(opened, found)
    text = garbage_text(found.garbage, delete)
    if found.kept:
        for line in (text, *found.kept):
            say(line)
        raise Problems(f"{len(found.kept)} segments were kept: `pipeline store repair` brings them back to readers")
    return {"deleted": delete, "found": [asdict(f) for f in found.garbage]}, text


@store.command(short_help="Put small segments together.")
@_STORE
@_SPACE
@command
def compact(as_json: bool, where: str, space: str) -> tuple[Any, str]:
    """Write duplicates, supplements and small segments anew; gc removes the old ones later."""
    from pipeline.store.upkeep.rewrite import compact as rewrite

    opened = _open(where)
    spaces = [opened.space(space)] if space else opened.spaces()
    done = {s.id: rewrite(s) for s in spaces}
    lines = [
        f"{i[:12]}: {d['old']} segments written anew as {d['new']}, {d['samples']:,} samples" for i, d in done.items()
    ]
    return done, "\n".join(lines)


@store.command()
@click.argument("space", metavar="SPACE")
@_STORE
@click.option("--yes", is_flag=True, help="Do not ask.")
@command
def rm(as_json: bool, space: str, where: str, yes: bool) -> tuple[Any, str]:
    """Remove a feature space with all its states."""
    from pipeline.store.upkeep.usage import finish_removals, remove_space
    from pipeline.terminal import size_text

    opened = _open(where)
    finished = finish_removals(opened, space) if space else []
    try:
        found = opened.space(space)
    except StoreError:
        if not finished:
            raise
        return {"space": finished[0], "bytes": 0}, f"removed what an interrupted rm had left of {finished[0][:12]}"
    size = size_text(sum(s.nbytes for s in found.segments()))
    if not yes and not click.confirm(f"remove space {found.id[:12]} with {size} of states?", err=True):
        raise UserError("nothing was removed")
    freed = remove_space(opened, found)
    return {"space": found.id, "bytes": freed}, f"removed {found.id[:12]}, {size}"


@store.command()
@_STORE
@command
def du(as_json: bool, where: str) -> tuple[Any, str]:
    """What takes how much room."""
    from pipeline.cli.store_report import usage_text
    from pipeline.store.upkeep.usage import usage

    what = usage(_open(where))
    return what, usage_text(what)


@store.command(short_help="Let a group of this machine use the store.")
@click.argument("group")
@_STORE
@command
def share(as_json: bool, group: str, where: str) -> tuple[Any, str]:
    """Let a group of this machine read and write the store, whatever each member's umask."""
    from pipeline.store.upkeep.share import share_with

    path = place(where)
    count = share_with(path, group)
    return {"store": path, "group": group, "paths": count}, f"{path}: group {group} may read and write ({count} paths)"
