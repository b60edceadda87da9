"""`python -m protos.api_page`: docs/control-api.md, from the comments in control.proto.

Needs grpcio-tools, as `make protos` does, which runs it.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[1]
SOURCE, PAGE = "protos/control.proto", ROOT / "docs" / "control-api.md"
FIRST = Path(__file__).with_name("api_page.md")
SERVICE, METHOD, FIELD, MESSAGE, ENUM = 6, 2, 2, 4, 5  # field numbers in descriptor.proto
VALUE = 2
TYPES = descriptor_pb2.FieldDescriptorProto.Type


def described() -> Any:
    """The file's descriptor, with its comments."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "set"
        options = [f"-I{ROOT}", "--include_source_info", f"--descriptor_set_out={out}"]
        if protoc.main(["protoc", *options, str(ROOT / SOURCE)]):
            raise SystemExit(f"{SOURCE} cannot be read")
        found = descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes())
    return next(f for f in found.file if f.name == SOURCE)


class Comments:
    """By path in the descriptor: those before an element, and those on its line."""

    def __init__(self, file: Any) -> None:
        self._known = {
            tuple(place.path): place.leading_comments + place.trailing_comments
            for place in file.source_code_info.location
        }

    def __call__(self, *path: int) -> str:
        return " ".join(self._known.get(path, "").split()).replace("|", "\\|")


def type_of(field: Any, messages: dict[str, Any]) -> str:
    name = (
        field.type_name.rpartition(".")[2] or TYPES.Name(field.type).removeprefix("TYPE_").lower()
    )
    entry = messages.get(name)
    if entry is not None and entry.options.map_entry:
        key, value = (type_of(f, messages) for f in entry.field)
        return f"map of {key} to {value}"
    return f"{name}, repeated" if field.label == field.LABEL_REPEATED else name


def fields(message: Any, path: tuple[int, ...], comments: Comments) -> Iterator[str]:
    nested = {n.name: n for n in message.nested_type}
    if message.field:
        yield from ("", "| field | type | |", "|---|---|---|")
    for number, field in enumerate(message.field):
        kind = type_of(field, nested) + (", may be unset" if field.proto3_optional else "")
        yield f"| `{field.name}` | {kind} | {comments(*path, FIELD, number)} |"


def page() -> Iterable[str]:
    """Lines of the page."""
    file = described()
    comments, messages = Comments(file), {m.name: (i, m) for i, m in enumerate(file.message_type)}
    service, told = file.service[0], set()
    yield FIRST.read_text().rstrip()
    yield from ("", f"## {file.package}.{service.name}", "", comments(SERVICE, 0))
    for number, method in enumerate(service.method):
        names = [kind.rpartition(".")[2] for kind in (method.input_type, method.output_type)]
        told |= set(names)
        stream = ", a stream" if method.server_streaming else ""
        yield from ("", f"### {method.name}", "", comments(SERVICE, 0, METHOD, number))
        for role, name in zip(("Request", f"Response{stream}"), names, strict=True):
            index, message = messages[name]
            about = comments(MESSAGE, index)
            empty = "" if message.field else ": nothing"
            yield from ("", f"{role} `{name}`{empty}. {about}".rstrip())
            yield from fields(message, (MESSAGE, index), comments)
    yield from ("", "## Messages", "", "Those of `tidewright.v1` are in `protos/deployment.proto`.")
    for name, (index, message) in messages.items():
        if name not in told:
            yield from ("", f"### {name}", "", comments(MESSAGE, index))
            yield from fields(message, (MESSAGE, index), comments)
    yield from ("", "## Enums")
    for number, enum in enumerate(file.enum_type):
        yield from (
            "",
            f"### {enum.name}",
            "",
            comments(ENUM, number),
            "",
            "| value | |",
            "|---|---|",
        )
        for i, value in enumerate(enum.value):
            yield f"| `{value.name}` | {comments(ENUM, number, VALUE, i)} |"


def text() -> str:
    lines = "\n".join(page()) + "\n"
    while "\n\n\n" in lines:
        lines = lines.replace("\n\n\n", "\n\n")
    return lines


if __name__ == "__main__":
    PAGE.write_text(text())
    sys.stdout.write(f"{PAGE.relative_to(ROOT)}\n")
