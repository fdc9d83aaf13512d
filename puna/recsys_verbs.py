"""`puna recsys`: parse, call one function, print. What it needs is imported inside the verbs."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from puna.verbs import as_json, print_figures

if TYPE_CHECKING:
    import numpy as np

of_ids = click.option(
    "--ids", type=click.Path(path_type=Path), help="Ids of the rows (.npy), which the receiver is taken to know."
)


@click.group()
def recsys() -> None:
    """Recommendation models: codec.

    \b
    Example:  puna recsys codec encode rows.npy --bound 0.01 --out rows.puna
    """


@recsys.group()
def codec() -> None:
    """Error-bounded compression of embedding rows: encode, decode.

    \b
    Example:  puna recsys codec encode rows.npy --ids ids.npy --bound 0.01 --out rows.puna
              puna recsys codec decode rows.puna --ids ids.npy --out again.npy
    """


@codec.command("encode")
@click.argument("rows", metavar="ROWS.npy", type=click.Path(path_type=Path))
@of_ids
@click.option("--bound", default=0.01, show_default=True, help="Largest error, as a share of the rows' max - min.")
@click.option(
    "--codec", "name", default="auto", show_default=True, help="auto, rans, fixed, raw, copy, huffman, vector_lz."
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File to write.")
@as_json
def codec_encode(rows: Path, ids: Path | None, bound: float, name: str, out: Path, as_json: bool) -> None:
    """Rows (n, D) of float32 to a stream.

    Repeated rows are sent once. With --ids the receiver is taken to know the ids, so that no index is sent.

    \b
    Example:  puna recsys codec encode rows.npy --bound 0.01 --out rows.puna
    """
    from puna.recsys.codec.api import bound_of, encode
    from puna.recsys.codec.stream import METHODS, read

    values, numbers = _load(rows), _load(ids) if ids else None
    began = time.perf_counter()
    stream = _named(f"{rows}{f' with {ids}' if ids else ''}", encode, values, numbers, bound, name)
    seconds = time.perf_counter() - began
    _write(out, stream)
    head = read(memoryview(stream))[0]
    figures = {
        "rows": head.num_rows,
        "width": head.width,
        "distinct_rows": head.num_distinct,
        "exact_rows": head.num_exceptions if head.grid else head.num_distinct,
        "codec": METHODS[head.method],
        "error_bound": bound_of(values, bound),
        "bytes": len(stream),
        "ratio": values.nbytes / len(stream),
        "seconds": seconds,
    }
    print_figures(figures, as_json)


@codec.command("decode")
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@of_ids
@click.option("--out", required=True, type=click.Path(path_type=Path), help="File of rows to write (.npy).")
@as_json
def codec_decode(file: Path, ids: Path | None, out: Path, as_json: bool) -> None:
    """A stream to rows (n, D) of float32.

    A stream that was made with --ids needs the same ids.

    \b
    Example:  puna recsys codec decode rows.puna --out again.npy
    """
    import io

    import numpy as np

    from puna.recsys.codec.api import decode

    stream, numbers = file.read_bytes(), _load(ids) if ids else None
    began = time.perf_counter()
    values = _named(f"{file}{f' with {ids}' if ids else ''}", decode, stream, numbers)
    seconds = time.perf_counter() - began
    buffer = io.BytesIO()
    np.save(buffer, values)
    _write(out, buffer.getbuffer())
    print_figures(
        {"rows": values.shape[0], "width": values.shape[1], "bytes": len(stream), "seconds": seconds}, as_json
    )


def _load(path: Path) -> "np.ndarray[Any, Any]":
    import numpy as np

    from puna.errors import DataError

    try:
        found = np.load(path, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise DataError(f"{path} is not a .npy file of numbers ({error})", "Write it by numpy.save.") from error
    if not isinstance(found, np.ndarray):
        raise DataError(f"{path} holds several arrays", "Give a .npy file of one.")
    return found


def _named(what: str, function: Any, *arguments: Any) -> Any:
    """function(*arguments), whose DataError then begins with what file it is about."""
    from puna.errors import DataError

    try:
        return function(*arguments)
    except DataError as error:
        raise DataError(f"{what}: {error.problem}", error.fix) from error


def _write(path: Path, data: Any) -> None:
    import os

    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)
