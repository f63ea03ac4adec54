"""`batch`: many prompts for one role at once, one result a line, in the order of the prompts."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from protocol.codec import check_value, describe
from protocol.errors import BadFrame
from protocol.limits import MAX_BATCH_PROMPTS, MAX_BODY_BYTES
from protocol.messages.batch import BatchFinal, BatchPartial, Prompt
from services.ctl.commands import Commands, Context
from services.ctl.hub import connect
from services.ctl.outcomes import BadInput, ExitCode
from services.ctl.screen import seconds
from services.kit.json_schema import BadSchema, check_schema

_EXAMPLES: Final = """FILE holds one prompt a line: a JSON string, or an object with the member "prompt"; - is stdin.
The output has one JSON object a line and prompt, with "text" or "failure". Exit 1 if any prompt failed.

examples:
  tierline batch worker --file prompts.jsonl > answers.jsonl
  tierline batch extractor --file prompts.jsonl --schema facts.schema.json | jq .text
"""
_PROMPT: Final = TypeAdapter(Prompt)


def add(commands: Commands) -> None:
    """Add the commands of this file."""
    batch = commands.add(
        "batch", _batch, "answer many prompts with one role, several at the same time", epilog=_EXAMPLES
    )
    batch.add_argument("role", metavar="ROLE")
    batch.add_argument("--file", type=Path, required=True, metavar="FILE", help="prompts, one JSON value a line")
    batch.add_argument("--max-tokens", type=int, metavar="N", help="longest answer (the role's)")
    batch.add_argument("--schema", type=Path, metavar="FILE", help="JSON Schema of every answer")
    batch.add_argument("--concurrency", type=int, metavar="N", help="prompts at the same time (the model's slots)")
    batch.add_argument("--timeout", type=float, default=600, metavar="S", help="seconds for all of them (600)")


def _batch(args: Namespace, context: Context) -> ExitCode:
    prompts = _prompts(args.file)
    schema = None if args.schema is None else _schema(args.schema)
    if not args.timeout > 0:  # nor is "nan"
        raise BadInput(f"--timeout {args.timeout:g}: must be above 0")
    try:
        finals = asyncio.run(_ask(args, prompts, schema, context))
    except ValidationError as err:
        raise BadInput(f"this batch cannot be asked: {describe(err)}") from err
    failed = sum(answer.failure is not None for final in finals for answer in final.answers)
    if not context.screen.json:
        took, widest = sum(final.wall_ms for final in finals), max(final.widest for final in finals)
        context.screen.note(
            f"{len(prompts) - failed} answered, {failed} failed in {seconds(took)} by {args.role} on "
            f"{finals[0].model}, up to {widest} at once"
        )
    return ExitCode.FAILED if failed else ExitCode.OK


async def _ask(
    args: Namespace, prompts: list[str], schema: dict[str, Any] | None, context: Context
) -> list[BatchFinal]:
    """Ask, as many prompts at once as one batch may have, and write the answers as each batch ends."""

    def show(piece: BatchPartial) -> None:
        context.screen.note(
            f"{piece.done + piece.failed} of {piece.total}, {piece.running} running, {piece.failed} failed, "
            f"{piece.generated_tokens} tokens"
        )

    live = context.screen.rich is not None
    until = time.monotonic() + args.timeout
    finals = []
    async with connect(context.home) as client:
        for at in range(0, len(prompts), MAX_BATCH_PROMPTS):
            asked = prompts[at : at + MAX_BATCH_PROMPTS]
            final = await client.llm_batch(
                args.role,
                asked,
                timeout_s=max(0.1, until - time.monotonic()),
                max_tokens=args.max_tokens,
                json_schema=schema,
                concurrency=args.concurrency,
                on_progress=show if live else None,
            )
            for prompt, answer in zip(asked, final.answers, strict=True):
                context.screen.record({"prompt": prompt, **answer.model_dump(mode="json", exclude_none=True)})
            finals.append(final)
    return finals


def _prompts(path: Path) -> list[str]:
    """The prompts of a file, all of them fit to be asked; raises BadInput naming the line that is none.

    Only a line feed ends a line: what else ends one in Unicode may stand in a JSON string as it is.
    """
    prompts = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as err:
            raise BadInput(f"{path}:{number}: not JSON ({err}); write each prompt as a JSON string") from err
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str) or not prompt:
            raise BadInput(f'{path}:{number}: no prompt: needs a string, or an object with the string "prompt"')
        try:
            prompts.append(_PROMPT.validate_python(prompt))
        except ValidationError as err:
            raise BadInput(f"{path}:{number}: no prompt: {err.errors()[0]['msg']}") from err
    if not prompts:
        raise BadInput(f"{path}: holds no prompts")
    return prompts


def _schema(path: Path) -> dict[str, Any]:
    """The schema of a file. Raises BadInput for what every single answer would fail for."""
    try:
        schema = json.loads(_text(path))
    except (ValueError, RecursionError) as err:
        raise BadInput(f"--schema {path}: not JSON: {err}") from err
    if not isinstance(schema, dict):
        raise BadInput(f"--schema {path}: a JSON Schema is an object")
    try:
        check_value(schema)
        check_schema(schema)
    except (BadFrame, BadSchema) as err:
        raise BadInput(f"--schema {path}: not a JSON Schema: {err}") from err
    return schema


def _text(path: Path) -> str:
    try:
        data = _read_stdin() if str(path) == "-" else _read(path)
        if len(data) > MAX_BODY_BYTES:
            raise BadInput(f"{path}: larger than the {MAX_BODY_BYTES:,} bytes that may be asked at once; split it")
        return data.decode("utf-8-sig")  # editors of some systems begin a file with a byte order mark
    except UnicodeDecodeError as err:
        line = data.count(b"\n", 0, err.start) + 1
        raise BadInput(f"{path}:{line}: not UTF-8: {err}") from err
    except OSError as err:
        raise BadInput(f"{path}: cannot be read: {err.strerror}") from err


def _read_stdin() -> bytes:
    if sys.stdin is None:  # whoever called us has closed it
        raise BadInput("-: there is no standard input; name a file")
    return sys.stdin.buffer.read(MAX_BODY_BYTES + 1)


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_BODY_BYTES + 1)
