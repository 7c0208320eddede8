"""Run notebooks with papermill, in order, with parameters that they declare; and turn one into an HTML report."""
import ast
import json
import re
import sys
from pathlib import Path
from typing import Any

from traitlets.config import Config

from vitlab.runtime.files import NOTEBOOKS, InputError, atomic_write, first_line, require

SHOWN = ["text/html", "text/markdown", "image/svg+xml", "image/png", "image/jpeg", "text/plain"]    # the first there is
POLICY = """<meta http-equiv="Content-Security-Policy" """ \
         """content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">"""
WORDS = "<style>pre {word-break: normal !important; overflow-wrap: anywhere}</style>"           # what is printed, whole
# else each kernel warns of plain TCP, and tells of its sockets and its parent's end when it is interrupted
ENCRYPTED = Config({"KernelManager": {"transport_encryption": "auto"},
                    "NotebookClient": {"extra_arguments": ["--log-level=CRITICAL"]}})
UNREADABLE = (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError, MemoryError)


def import_nbformat() -> None:
    """Import nbformat as without rfc3987_syntax, where it is not there yet: for that, jsonschema builds a grammar of
    IRIs, in seconds, and nothing in a notebook is checked by it."""
    left_out = sys.modules.setdefault("rfc3987_syntax", None) is None   # ty: ignore[no-matching-overload]
    import nbformat  # noqa: F401
    if left_out:
        del sys.modules["rfc3987_syntax"]


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} can't be read as a notebook of format 4 ({first_line(error)})")


def code_of(path: str | Path, tag: str | None = None) -> list[str]:
    """The code cells of a notebook, or those with a tag. Raises InputError without such a notebook, and for a file that
    is none."""
    path = Path(path)
    require(path.is_file(), f"{path}: no such notebook")
    try:
        return ["".join(cell["source"]) for cell in json.loads(path.read_bytes())["cells"]
                if cell["cell_type"] == "code" and (tag is None or tag in cell["metadata"].get("tags", []))]
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def declared(path: str | Path) -> dict[str, Any]:
    """{parameter: default} of the cell tagged `parameters`. Raises InputError without such a notebook or cell."""
    path, cells = Path(path), code_of(path, "parameters")
    require(len(cells) == 1, f"{path}: {len(cells)} cells are tagged `parameters`; one is needed")
    try:
        return {node.target.id: ast.literal_eval(node.value or "") for node in ast.parse(cells[0]).body
                if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)}
    except UNREADABLE as error:
        raise _unreadable(path, error) from None


def check_parameters(path: str | Path, given: dict[str, Any]) -> None:
    """InputError for a parameter that the notebook does not declare, or of another type than its default."""
    known = declared(path)
    for name, value in given.items():
        require(name in known, f"{path}: no parameter {name!r}; it declares {', '.join(sorted(known))}")
        default = known[name]
        kind = (list, str) if isinstance(default, list) else type(default)      # one text stands for a list of one
        fits = isinstance(value, kind) and not (isinstance(value, bool) and not isinstance(default, bool))
        if default is not None and not fits and not (isinstance(default, float) and type(value) is int):
            raise InputError(f"{path}: {name} is {value!r}; a {type(default).__name__} such as {default!r} is needed")


def run(path: str | Path, out: str | Path, parameters: dict[str, Any] | None = None, *,
        progress: bool | dict[str, Any] = True) -> Path:
    """Execute a notebook; returns the executed copy, out/NAME.ipynb. Parameters are checked before anything starts.
    progress: a bar over the cells, and what they print; settings of a bar (tqdm's): that bar alone.

    Raises InputError naming the cell and its error where one fails; the copy up to there is kept.
    """
    path, parameters = Path(path), parameters or {}
    check_parameters(path, parameters)
    import_nbformat()
    import papermill  # here: what only checks a batch does without it
    from papermill.exceptions import PapermillExecutionError
    target = Path(out) / path.name
    names = (str(place).replace("{", "{{").replace("}", "}}") for place in (path, target))     # papermill formats them
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(*names, parameters=parameters, kernel_name="python3", language="python",
                                   progress_bar=progress, stdout_file=sys.stderr if progress is True else None,
                                   config=ENCRYPTED, coalesce_streams=True)     # bars as they ended
    except PapermillExecutionError as error:
        raise InputError(
            f"{path.name}: cell {error.cell_index} failed: {error.ename}: {error.evalue} (see {target})") from None
    return target


def report(executed: str | Path, target: str | Path) -> Path:
    """The executed notebook as one HTML page, without its code. It loads nothing from elsewhere and runs no script; a
    widget is shown as its picture."""
    import_nbformat()
    from nbconvert import HTMLExporter
    name = f"vitlab: {Path(target).resolve().parent.name}"
    exporter = HTMLExporter(exclude_input=True, exclude_input_prompt=True, exclude_output_prompt=True,
                            embed_images=True, config=Config({"NbConvertBase": {"display_data_priority": SHOWN}}))
    html, _ = exporter.from_file(str(executed), resources={"metadata": {"name": name}})
    html = re.sub(r"<script\b.*?</script>", "", html, flags=re.DOTALL)          # its own; those in data are escaped
    atomic_write(target, html.replace("<head>", f"<head>{POLICY}", 1).replace("</head>", f"{WORDS}</head>", 1))
    return Path(target)


def copy_all(folder: str | Path) -> list[Path]:
    """Copies of the notebooks that come with vitlab, in a folder of one's own; returns them. Raises InputError, with
    nothing copied, where one is there already that differs.

    Args:
        folder: where they go
    """
    copies = {Path(folder) / path.name: path.read_bytes() for path in sorted(NOTEBOOKS.glob("*.ipynb"))}
    changed = [str(path) for path, content in copies.items() if path.exists() and path.read_bytes() != content]
    require(not changed, f"{', '.join(changed)}: there already, and not as it comes with vitlab; move it away, or "
            "choose another folder")
    for path, content in copies.items():
        atomic_write(path, content)
    return list(copies)
