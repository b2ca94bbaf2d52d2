"""What load is put on, in the words of the command line: for ``load``, ``gate`` and ``compare``."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import numpy as np
from cyclopts import Parameter

from hasten.cli import units
from hasten.cli.files_of import Rows, files_for
from hasten.cli.infer import signature_of
from hasten.cli.models import DataOptions
from hasten.client.client import Client
from hasten.deployment import FILE, read_deployment
from hasten.errors import BadInput, InvalidSetting
from hasten.load.payloads import Payload, payloads_of, payloads_of_files, probe, probe_http
from hasten.load.run import LoadRun
from hasten.load.target import PROTOCOLS, Protocol, Target
from hasten.report import format as fmt
from hasten.samples import Samples
from hasten.samples.readers import read_samples
from hasten.tensors import Signature, TensorSpec

CANNOT_TELL = 4
"""The exit code of work that is done, where what was measured does not decide: too few requests, a late generator."""


@Parameter(name="*", group="The server")
@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """How the server is called."""

    protocol: Protocol | None = None
    """By default rest-binary for http://, grpc for grpc://, session for a deployment's file or folder."""
    version: str | None = None
    """A version of the model; by default the one that the server routes to."""
    batch: int = 1
    """Rows in one request."""
    timeout: Annotated[float, units.read_by(units.seconds)] = 10.0
    """Time after which an answer counts as missed, as 2s; from the scheduled time."""
    processes: int = 1
    """Generators that share the plan; each has a core of its own where there are so many."""
    connections: int = 1024
    """Most connections at once of one generator."""
    instances: int = 1
    """With --protocol session: sessions that run at once."""
    method: str = "POST"
    """With --protocol http: the method."""
    header: Annotated[tuple[str, ...], Parameter(consume_multiple=False)] = ()
    """With --protocol http: a header, as 'Content-Type: image/jpeg'; repeat it for more."""
    api_key: str | None = None
    """The key that the server wants."""
    certificate: Path | None = None
    """A file of certificates to trust, in PEM."""


TARGET = TargetOptions()


def target_of(url: str, model: str | None, options: TargetOptions) -> Target:
    """Make a target of what was typed. Raises InvalidSetting: a part is missing, or has no meaning here."""
    protocol = options.protocol or _protocol_of(url)
    if protocol not in PROTOCOLS:
        raise InvalidSetting(f"--protocol is {protocol!r}, and must be {', '.join(PROTOCOLS)}")
    if model is None and protocol not in ("http", "session"):
        raise InvalidSetting(f"load over {protocol} needs the model's name after the URL")
    for name in ("batch", "processes", "connections", "instances"):
        if getattr(options, name) < 1:
            raise InvalidSetting(f"--{name} is {getattr(options, name)}, and must be 1 or more")
    made = Target(
        url=url,
        protocol=protocol,
        model=model or (Path(url).name if protocol == "session" else ""),
        version=options.version,
        api_key=options.api_key,
        certificate=options.certificate,
        connections=options.connections,
        verb=options.method.upper(),
        headers=dict(_header(text) for text in options.header),
        instances=options.instances,
    )
    if protocol != "session":
        made.address  # noqa: B018 - an address that is none is told now
    return made


def payloads_for(target: Target, data: str | None, samples: DataOptions, options: TargetOptions) -> tuple[Payload, ...]:
    """Read the samples, encode them, and see that the target answers one of them, before any load.

    Raises:
        ServeError: the target does not answer, or not what the protocol says. HastenError: the samples do not fit.
    """
    if target.protocol == "http":
        found = payloads_of_files(target, _files(data))
        probe_http(target, found[0], timeout_s=options.timeout)
        return found
    if data is None:
        raise InvalidSetting(f"load over {target.protocol} needs samples; give them with --data")
    read = rows_of(target, data, samples)
    if target.protocol != "session":
        probe(target, read, batch=options.batch)
    return payloads_of(target, read, batch=options.batch)


def check_long_enough(requests: int, duration_s: float, needed: int, quantile: float) -> None:
    """Raise BadInput where a run is too short to prove a percentile, with the time that it needs."""
    if requests < needed:
        seconds = duration_s * needed / max(requests, 1)
        raise BadInput(
            f"{fmt.seconds(duration_s)} of this plan are {requests} requests, and p{quantile * 100:g} needs {needed}; "
            f"use --duration {seconds * 1.05:.0f}s or more"
        )


def default_folder(home: Path, run: LoadRun) -> Path:
    """Give where a run is kept that was not told where."""
    named = "".join(char if char.isalnum() or char in "-_." else "-" for char in run.model or "endpoint")
    return home / "load" / f"{named}-{datetime.now(UTC):%Y%m%dT%H%M%S}"


def python_lines(url: str, model: str | None, data: str | None, options: TargetOptions) -> list[str]:
    """Write the Python lines that make the target and its payloads."""
    changed = replace(options, timeout=TARGET.timeout)
    told = {
        name: value for name, value in vars(changed).items() if value != getattr(TARGET, name) and name != "api_key"
    }
    more = "".join(f", {name}={value!r}" for name, value in told.items())
    return [
        "from hasten.cli.load_target import TargetOptions, payloads_for, target_of",
        "from hasten.cli.models import DATA",
        "from hasten.load.arrivals import read_arrivals",
        "from hasten.load.figures import figures_of",
        "from hasten.load.generate import open_load",
        "from hasten.load.target import LoadPlan",
        "",
        f"options = TargetOptions({more.removeprefix(', ')})",
        f"target = target_of({url!r}, {model!r}, options)",
        f"payloads = payloads_for(target, {data!r}, DATA, options)",
    ]


def _protocol_of(url: str) -> Protocol:
    if url.startswith(("grpc://", "grpcs://")):
        return "grpc"
    if "://" not in url and Path(url).exists():
        return "session"
    return "rest-binary"


def rows_of(target: Target, data: str, options: DataOptions) -> Samples | Rows:
    """Read what a target's model is sent: samples, or where it takes the files of images, those as they are.

    Raises:
        HastenError: there is no such model, or the data does not fit it.
    """
    if target.protocol == "session":
        return samples_of(target, data, options)
    signature = _signature(target)
    return files_for(data, signature, options, limit=options.limit) or _read(target, data, options, signature)


def samples_of(target: Target, data: str, options: DataOptions) -> Samples:
    """Read samples for a target's model. Raises HastenError: there is no such model, or the samples do not fit it."""
    if target.protocol == "session":
        path = Path(target.url)
        _, artifact = read_deployment(path / FILE if path.is_dir() else path)
        return options.read(data, artifact)
    return _read(target, data, options, _signature(target))


def _read(target: Target, data: str, options: DataOptions, signature: Signature) -> Samples:
    if not signature.inputs:
        signature = _signature_of_file(Path(data), target)
    found = read_samples(
        data,
        signature,
        preprocess=options.preprocess,
        inputs=options.inputs,
        label=options.label,
        limit=options.limit,
    ).samples
    found.check(signature)
    return found


def _signature(target: Target) -> Signature:
    with Client(target.url, api_key=target.api_key, certificate=target.certificate) as client:
        return signature_of(client.metadata(target.model, version=target.version))


def _signature_of_file(path: Path, target: Target) -> Signature:
    """Take the inputs from a file's own arrays, where the server tells none (KServe's and MLServer's are free not to).

    Raises:
        BadInput: it is no .npz file, or none that can be read.
    """
    problem = f"the server tells no inputs of model {target.model!r}; give --data as .npz, its arrays named as they are"
    if path.suffix != ".npz":
        raise BadInput(f"{problem}, not {path.name}")
    try:
        with np.load(path, allow_pickle=False) as arrays:
            shapes = {name: (arrays[name].dtype.name, arrays[name].shape) for name in arrays.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path} cannot be read as .npz: {error}") from error
    inputs = tuple(TensorSpec(name, dtype, ("batch", *shape[1:])) for name, (dtype, shape) in shapes.items())
    if not inputs:
        raise BadInput(f"{problem}; {path} has none")
    return Signature(inputs, ())


def _files(data: str | None) -> list[Path]:
    if data is None:
        return []
    path = Path(data)
    if not path.exists():
        raise BadInput(f"there is no file or folder {data}; --data has the bodies of the requests, a file each")
    found = sorted(item for item in path.iterdir() if item.is_file()) if path.is_dir() else [path]
    if not found:
        raise BadInput(f"{data} has no files in it; --data has the bodies of the requests, a file each")
    return found


def _header(text: str) -> tuple[str, str]:
    name, colon, value = text.partition(":")
    if not colon or not name.strip():
        raise InvalidSetting(f"--header {text!r} is none; write it as 'Name: value'")
    return name.strip(), value.strip()
