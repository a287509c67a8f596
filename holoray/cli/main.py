"""`holoray encode | inspect | verify | load | …`: parse, call, show; heavy imports wait for a verb."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn

import typer

from holoray.cli.options import (
    Decompress,
    DeviceBytes,
    Expect,
    Json,
    MinQuality,
    MoreShares,
    Quiet,
    SkipCorrupted,
    SourcePaths,
    SourcesFile,
    StorePath,
)
from holoray.cli.output import Output, counted, decibel, fail, human_bytes, printable, short, shown, table
from holoray.errors import DeviceError, FormatError, HolorayError, IntegrityError, UsageError

if TYPE_CHECKING:
    from holoray.pipelines.sealed_store import SealedStore

app = typer.Typer(
    name="holoray",
    help="Progressive model warm-up: encode a checkpoint once, load it usable early and bit-exact at last.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_output: list[Output] = [Output(json=False, quiet=False)]
INTERRUPTED: Final = 130


def _begin(json: bool, quiet: bool) -> Output:
    _output[0] = Output(json, quiet)
    return _output[0]


@app.command()
def encode(
    source: Annotated[str, typer.Argument(help="A .safetensors file, or a directory of them.", metavar="INPUT")],
    store: StorePath,
    codec: Annotated[str, typer.Option(help="planes, raw, spectral, projection, lowrank or auto.")] = "planes",
    fragments: Annotated[int, typer.Option(help="Fragments a tensor (planes and raw cut by size).")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of signs, probes and dealing.")] = 0,
    tile: Annotated[int, typer.Option(help="Tile of spectral's transform; 0 is the whole matrix.")] = 0,
    essential: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the energy that rides in every fragment; 0: none.")
    ] = 0.0,
    rank: Annotated[int, typer.Option(help="Greatest rank of lowrank; 0: the full one.")] = 0,
    energy: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of the energy that lowrank keeps; 0: all of it.")
    ] = 0.0,
    coefficients: Annotated[
        str, typer.Option(help="How transforms and lowrank store numbers: float32 or float16.")
    ] = "float32",
    dtype: Annotated[str | None, typer.Option(help="Cast floating tensors first: bf16, f16 or f32.")] = None,
    pattern: Annotated[
        list[str] | None, typer.Option(metavar="GLOB=CODEC", help="Codec for tensors by name; the first match wins.")
    ] = None,
    compression: Annotated[str, typer.Option(help="zstd, lz4 or none.")] = "zstd",
    shares: Annotated[
        int | None, typer.Option(metavar="N", help="Spread the store over N shares, STORE/share-0 and on.")
    ] = None,
    usable_from: Annotated[
        int | None, typer.Option(metavar="K", help="Any K shares give a usable model; default: half of them.")
    ] = None,
    exact_from: Annotated[
        int | None, typer.Option(metavar="K", help="Any K shares give everything; default: all but one.")
    ] = None,
    usable_layers: Annotated[
        float | None, typer.Option(metavar="LAYERS", help="Layers of a usable model; default: 2.25.")
    ] = None,
    layer_shares: Annotated[
        str | None, typer.Option(metavar="K,K,…", help="How many shares each layer needs, instead of the three above.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a store that is already there.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Encode a checkpoint into a store. An interrupted encode resumes when run again."""
    out = _begin(json, quiet)
    from holoray.checkpoint import open_checkpoint
    from holoray.cli.shares import spread
    from holoray.pipelines.api import encode as encode_checkpoint

    total = sum(spec.nbytes for spec in open_checkpoint(source).specs)
    with out.progress("encoding", total) as advance:
        report = encode_checkpoint(
            source,
            store,
            codec=codec,
            fragments=fragments,
            seed=seed,
            dtype=dtype,
            pattern=pattern or [],
            compression=compression,
            tile=tile,
            essential=essential,
            rank=rank,
            energy=energy,
            coefficients=coefficients,
            shares=spread(shares, usable_from, exact_from, usable_layers, layer_shares),
            overwrite=overwrite,
            on_tensor=lambda name, nbytes: advance(nbytes, short(name)),
        )
    share = report.bytes_stored / max(report.bytes_in, 1)
    out.result(
        asdict(report),
        f"{report.tensors} tensors in {report.fragments} fragments: {human_bytes(report.bytes_in)} -> "
        f"{human_bytes(report.bytes_stored)} ({share:.1%}) in {report.seconds:.1f} s, root {report.root}",
    )
    out.warn(report.notes)


@app.command()
def inspect(
    store: StorePath,
    file: Annotated[
        Path | None, typer.Argument(help="With --plot: draw into this file (.png, .svg, .pdf).", metavar="FILE.png")
    ] = None,
    plot: Annotated[bool, typer.Option("--plot", help="Draw how quality grows with the bytes read.")] = False,
    tensor: Annotated[str | None, typer.Option(help="Show this tensor only.", metavar="NAME")] = None,
    share: MoreShares = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what a store holds and how quality grows with the bytes read (from the manifest alone)."""
    out = _begin(json, quiet)
    from holoray.cli.shares import all_shares
    from holoray.cli.views import curve_table, inspection, quantised_lines, tensor_table
    from holoray.pipelines.sealed_store import SealedStore

    if file is not None and not plot:
        raise UsageError(f"what is {file} for?", hint="add --plot to draw into a file")
    sealed = SealedStore(all_shares(store, share))
    values = inspection(sealed, tensor)
    if plot:
        _plot(out, sealed, tensor, file)
    out.result(
        values,
        f"{values['tensors']} tensors, {values['fragments']} fragments, {human_bytes(values['bytes_in'])} stored as "
        f"{human_bytes(values['bytes_stored'])}, root {values['root']}{quantised_lines(values)}",
        *([] if plot else [tensor_table(values), curve_table(values)]),
    )
    out.warn(sealed.store.notes())


def _plot(out: Output, sealed: SealedStore, tensor: str | None, file: Path | None) -> None:
    from holoray.cli.plot import lines_of, on_terminal, to_file

    lines = lines_of(sealed, tensor)
    if file is None:
        out.drawing(lambda width: on_terminal(lines, width))
    else:
        to_file(lines, file, f"quality of {printable(tensor or sealed.store.uri)}")


@app.command()
def verify(
    store: StorePath, share: MoreShares = None, expect: Expect = None, json: Json = False, quiet: Quiet = False
) -> None:
    """Check every byte of a store against its root; names each bad file, tensor and fragment (exit code 3).

    Of shares, also those that are missing, and each bad file and chunk.
    """
    out = _begin(json, quiet)
    from holoray.cli.shares import all_shares, share_faults, share_faults_table
    from holoray.pipelines.sealed_store import SealedStore
    from holoray.pipelines.verify import BadFragment
    from holoray.stores import ShareSet

    root, bad, bad_shares, in_shares = None, [], [], False
    try:
        sealed = SealedStore(all_shares(store, share), expect)
        root = sealed.root
        in_shares, bad_shares = isinstance(sealed.store, ShareSet), share_faults(out, sealed.store)
        with out.progress("verifying", sum(t.stored_bytes for t in sealed.manifest.tensors)) as advance:
            bad = sealed.verify(lambda nbytes: advance(nbytes, ""))
    except (FormatError, IntegrityError) as error:  # root or manifest: nothing behind them can be believed
        bad = [BadFragment("ROOT, manifest.arrow", None, None, error.message)]
    faults = table("damaged", "file", "tensor", ">fragment", "why")
    for row in bad:
        faults.add_row(row.file, short(row.tensor or ""), "" if row.fragment is None else str(row.fragment), row.why)
    out.result(
        {
            "root": root,
            "ok": not bad and not bad_shares,
            "bad": [asdict(row) for row in bad],
            **({"bad_shares": [asdict(row) for row in bad_shares]} if in_shares else {}),
        },
        _verdict(shown(store), root, len(bad), len(bad_shares)),
        *([faults] if bad else []),
        *([share_faults_table(bad_shares)] if bad_shares else []),
    )
    if not out.for_people:  # who has no tables
        out.warn([str(row) for row in (*bad, *bad_shares)])
    if bad_shares:
        out.warn(["run `holoray repair` to put the shares right"])
    if bad or bad_shares:
        sys.exit(IntegrityError.exit_code)


def _verdict(store: str, root: str | None, faults: int, faults_of_shares: int) -> str:
    if faults:
        return f"{counted(faults, 'fault')} in {store}"
    if faults_of_shares:
        return f"all of {store} can be read, but its shares have {counted(faults_of_shares, 'fault')}, root {root}"
    return f"{store} is whole, root {root}"


@app.command()
def load(
    stores: SourcePaths = None,
    *,
    target: Annotated[Path, typer.Argument(help="The safetensors file to write.", metavar="OUT.safetensors")],
    quality: Annotated[float | None, typer.Option(help="Stop at this quality; 1 means everything.")] = None,
    nbytes: Annotated[
        int | None, typer.Option("--bytes", help="Read at most so many bytes, with the manifest.")
    ] = None,
    fragments: Annotated[
        str | None, typer.Option(help="Load these fragment indices of each tensor (planes: layers), e.g. 0,2,5.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to decode: cpu, cuda or cuda:N.")] = "cpu",
    device_bytes: DeviceBytes = None,
    decompress: Decompress = "host",
    dequantise: Annotated[
        str | None,
        typer.Option(help="Quantised layers (GPTQ, AWQ, int8) become weights of this dtype: bf16, f16 or f32."),
    ] = None,
    sources: SourcesFile = None,
    skip_corrupted: SkipCorrupted = False,
    min_quality: MinQuality = 0.0,
    share: MoreShares = None,
    expect: Expect = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Load a store, or as much of it as asked for, into a safetensors file.

    Copies of the store may be named before OUT: what one lies about or does not give comes from the others.
    """
    out = _begin(json, quiet)
    from holoray.cli.load import run_load
    from holoray.cli.sources import places, policy_of
    from holoray.pipelines.plan import Target

    run_load(
        out,
        places(stores, sources, share),
        target,
        Target(quality, nbytes, None if fragments is None else _indices(fragments)),
        expect=expect,
        policy=policy_of(skip_corrupted, min_quality),
        dequantise=dequantise,
        device=device,
        device_bytes=device_bytes,
        decompress=decompress,
    )


@app.command()
def warmup(
    stores: SourcePaths = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Worker actors; default: one a CPU, also of nodes that join a cluster later; one a GPU."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where weights go: cpu, or cuda for every GPU of the cluster.")] = "cpu",
    device_bytes: DeviceBytes = None,
    decompress: Decompress = "host",
    placement: Annotated[
        str, typer.Option(help="What each GPU gets: replicate, all tensors; or shard, each tensor on one of them.")
    ] = "replicate",
    place: Annotated[
        list[str] | None,
        typer.Option(metavar="GLOB=NUMBER", help="With shard: tensors that go to shard NUMBER, from 0 (repeatable)."),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option("--in-place", help="On GPUs: refine weights where they are: memory for one generation, not two."),
    ] = False,
    quality: Annotated[
        list[float] | None, typer.Option(help="Publish a generation at this quality (repeatable).")
    ] = None,
    out_dir: Annotated[Path | None, typer.Option("--out", help="Write generations to DIR/model.safetensors.")] = None,
    address: Annotated[str | None, typer.Option(help="Join a running Ray cluster, e.g. auto.")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Serve Prometheus metrics while the command runs; 0 takes a free port.")
    ] = None,
    patience: Annotated[
        float | None, typer.Option(help="Seconds to wait for a worker, e.g. until a cluster has grown; default: 60.")
    ] = None,
    sources: SourcesFile = None,
    skip_corrupted: SkipCorrupted = False,
    min_quality: MinQuality = 0.0,
    share: MoreShares = None,
    expect: Expect = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Warm a model up on Ray: usable generations first, exact at the end."""
    out = _begin(json, quiet)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}", hint="cpu or cuda")
    from holoray.cli.sources import places, policy_of, warn_of_skipped
    from holoray.cli.views import generation_table
    from holoray.cli.warmup import run_warmup

    values: dict[str, Any] = run_warmup(
        out,
        places(stores, sources, share),
        workers=workers,
        qualities=tuple(quality or ()),
        out_dir=out_dir,
        address=address,
        metrics_port=metrics_port,
        patience_s=patience,
        expect=expect,
        device=device,
        device_bytes=device_bytes,
        decompress=decompress,
        placement=placement,
        place=tuple(place or ()),
        in_place=in_place,
        fault_policy=policy_of(skip_corrupted, min_quality),
    )
    out.result(
        values,
        f"quality {values['quality']:.6f} ({decibel(values['snr_db'])}) from {human_bytes(values['bytes_read'])} "
        f"in {values['seconds']:.2f} s",
        generation_table(values["generations"]),
    )
    warn_of_skipped(out, values.get("skipped", 0))
    out.warn(values["notes"])


@app.command()
def serve(
    store: StorePath,
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")],
    host: Annotated[str, typer.Option(help="Address to listen on; others than loopback take TLS and a token.")] = (
        "127.0.0.1"
    ),
    tls_cert: Annotated[Path | None, typer.Option(help="Certificate chain (PEM).", metavar="FILE")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="Key of the certificate (PEM).", metavar="FILE")] = None,
    token_env: Annotated[
        str | None, typer.Option(help="Environment variable with the token that clients must show.", metavar="NAME")
    ] = None,
    readers: Annotated[int, typer.Option(help="Ranges sent at once; others wait.")] = 32,
    share: MoreShares = None,
    metrics_port: Annotated[int | None, typer.Option(help="Serve Prometheus metrics; 0 takes a free port.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Serve a store to other machines over Arrow Flight (grpc://HOST:PORT), read only, until SIGINT or SIGTERM."""
    out = _begin(json, quiet)
    from holoray.cli.serve import run_serve

    run_serve(
        out,
        store,
        shares=share,
        host=host,
        port=port,
        tls_cert=tls_cert,
        tls_key=tls_key,
        token_env=token_env,
        readers=readers,
        metrics_port=metrics_port,
    )


@app.command()
def repair(
    places: Annotated[
        list[str], typer.Argument(help="Where share-0, share-1, … lie, or the place of each share.", metavar="PLACE...")
    ],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Rebuild lost and bad shares of a store from the others, in place; nothing else is changed.

    A place that is empty takes a missing share. Exit code 3 if not everything could be rebuilt.
    """
    out = _begin(json, quiet)
    from holoray.cli.shares import run_repair

    if not run_repair(out, places):
        sys.exit(IntegrityError.exit_code)


@app.command()
def doctor(
    device: Annotated[str, typer.Option(help="What has to work: cpu or cuda.")] = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what this machine has, what is missing, and how to get it. Exit code 5: what is asked for does not work."""
    out = _begin(json, quiet)
    if device not in ("cpu", "cuda"):
        raise UsageError(f"--device {device}", hint="cpu or cuda")
    from holoray.cli.doctor import run_doctor

    if not run_doctor(out, device=device):
        sys.exit(DeviceError.exit_code)


@app.command()
def version() -> None:
    """Print the version."""
    from holoray.version import __version__

    print(__version__)


def _indices(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--fragments {text!r} is no list of numbers", hint="e.g. --fragments 0,2,5") from None


class _Interrupted(BaseException):
    """SIGINT, under a name that the argument parser does not turn into its own `Aborted!` and exit code 1."""


def _interrupt(*_: object) -> None:
    raise _Interrupted


def main() -> None:
    """Run the command line; ends by `sys.exit` with 0, or what went wrong: see the table in README.md."""
    # What fails before a command could say so still answers in the format that was asked for.
    _output[0] = Output(json="--json" in sys.argv, quiet=False)
    signal.signal(signal.SIGINT, _interrupt)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what goes wrong is said by our errors
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except _ParserError as error:
        _show_usage_error(error)
    except _Interrupted:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains at exit
        sys.exit(1)
    except Exception as error:
        if os.environ.get("HOLORAY_DEBUG"):
            raise
        fail(error if isinstance(error, HolorayError) else _bug(error), _output[0])


# Typer carries its own copy of click and exports only some of its errors: their common base is among the ancestors.
_ParserError: type[Any] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


def _show_usage_error(error: Any) -> NoReturn:
    context = getattr(error, "ctx", None)
    if not error.format_message():  # no command at all: what was shown is the help
        error.show()
        sys.exit(error.exit_code)
    path = context.command_path if context is not None else "holoray"
    fail(UsageError(error.format_message(), hint=f"see `{path} --help`"), _output[0])


def _bug(error: Exception) -> HolorayError:
    return HolorayError(
        f"{type(error).__name__}: {error}", hint="this is a bug in holoray; HOLORAY_DEBUG=1 shows the traceback"
    )
