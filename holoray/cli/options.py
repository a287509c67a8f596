"""Arguments and options that several verbs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing unless something is wrong.")]
StorePath = Annotated[
    str,
    typer.Argument(
        help="Path or URI of the store: a directory, s3://…, gs://…, hdfs://…, http(s)://…, grpc://….",
        metavar="STORE",
    ),
]
SourcePaths = Annotated[
    list[str] | None,
    typer.Argument(help="Paths or URIs of the store, and of copies of it that are read together.", metavar="STORE..."),
]
SourcesFile = Annotated[
    Path | None, typer.Option("--sources", help="A TOML file with more sources and their priorities.", metavar="FILE")
]
SkipCorrupted = Annotated[
    bool, typer.Option("--skip-corrupted", help="Go on without fragments that are corrupt in every source.")
]
MinQuality = Annotated[
    float, typer.Option(help="With --skip-corrupted: fail (exit code 4) if the end is below this quality.")
]
MoreShares = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        help="STORE is a share or a folder of shares, and here are others (repeatable).",
        metavar="PLACE",
    ),
]
DeviceBytes = Annotated[
    int | None, typer.Option(help="Memory of a device to use at most, in bytes; default: what is free, less a reserve.")
]
Decompress = Annotated[
    str,
    typer.Option(
        help="Where zstd frames are opened: host; device (by nvCOMP, fragments of raw); or auto, the device where "
        "nvCOMP is installed. Which is faster was not measured."
    ),
]
Expect = Annotated[
    str | None, typer.Option("--expect", help="Root that the store must have (sha256:…); checks sha256 everywhere.")
]
