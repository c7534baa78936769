"""Compiles a jitted function, also for GPUs that are not there: then in a child process, whose abort is an error here.

    here    jitted --jax.export, over an AbstractMesh--> bytes, locations of the user's lines included
    child   bytes --deserialise, jit with the same shardings and donation--> the GPU compiler -> text, memory figures

Only the child has the environment variable that lets the CUDA plugin start without a GPU. What it returns is kept on disk by
content: the program, the topology, the options and jax's version.
"""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from zerojax.errors import CompileError, ModelError
from zerojax.layout import topology as topologies
from zerojax.layout.topology import Topology
from zerojax.plan import identity, provenance
from zerojax.policy import has_64_bits

FORMAT = 1  # of what is kept on disk: to be raised when the child does something else
CACHE_VARIABLE = "ZEROJAX_CACHE"
MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output", "host_alias", "host_temp")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What came out.

    Attributes:
      text: the optimised, scheduled program.
      memory: the compiler's figures in bytes per device, by the names of `MEMORY`.
      seconds: how long the compiler took.
      cached: the answer of an earlier, identical request.
    """

    text: str
    memory: Mapping[str, int]
    seconds: float
    cached: bool = False


def compile(jitted: Any, args: Sequence[Any], kwargs: Mapping[str, Any], mesh: Mesh | AbstractMesh, options: Mapping[str, Any],
            *, cache: bool = True) -> Compiled:
    """Compiles `jitted(*args, **kwargs)` for the devices of `mesh`.

    Args:
      jitted: a `jax.jit`ted function.
      args, kwargs: arrays or `ShapeDtypeStruct`s with shardings over `mesh`.
      options: compiler options.

    Raises:
      CompileError: the compiler failed; with its last lines, the options and the exit status.
      ModelError: the function calls back to Python, which can't be compiled for devices elsewhere.
      PolicyError, MissingExtraError: see `topology.devices`.
    """
    traced = jitted.trace(*args, **kwargs)
    absent = Topology.of(mesh) if isinstance(mesh, AbstractMesh) else None
    if absent is None:
        return _here(traced, options)
    topologies.check_installed()
    request = {"topology": absent.text, "mesh": list(mesh.shape.items()), "inputs": _inputs(traced, args, kwargs),
               "options": {**topologies.COMPILER_OPTIONS, **options}}
    program, content = _export(jitted, traced, args, kwargs)
    known = [FORMAT, jax.__version__, absent.gpu.target(), os.environ.get("XLA_FLAGS")]  # the user's, which the child inherits
    what = json.dumps([request, content, known], sort_keys=True)
    path = _cache() / f"{hashlib.sha256(what.encode()).hexdigest()}.json.gz"
    return _elsewhere(program, request, absent, path if cache else None)


def _inputs(traced, args, kwargs) -> list[dict]:
    """Of each array that goes in: its spec, and whether it is donated. Those that are not used take their place, too."""
    given = dict(jax.tree.leaves_with_path((tuple(args), dict(kwargs))))
    infos = jax.tree.leaves_with_path(traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
    spec = lambda x: list(x.sharding.spec) if isinstance(getattr(x, "sharding", None), NamedSharding) else []
    return [{"spec": spec(given[path]), "donated": info.donated} for path, info in infos]


def _here(traced, options) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(f"the compiler refused the step, with options {dict(options)}: {error}") from error
    return Compiled(compiled.as_text(), _memory(compiled), time.perf_counter() - start)


def _memory(compiled) -> dict[str, int]:
    stats = compiled.memory_analysis()
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in MEMORY}


def _export(jitted, traced, args, kwargs) -> tuple[bytes, list[str]]:
    """The function as portable bytes, its trees flat (user's classes have no place in them); and what it is, wherever called."""
    from jax import export

    try:
        exported = _exported(export, jitted, traced, args, kwargs)
    except (NotImplementedError, ValueError) as error:
        if "callback" not in str(traced.jaxpr) and "debug_print" not in str(traced.jaxpr):
            raise
        raise ModelError("the step calls back to Python, which can't be compiled for GPUs that are not there; leave "
                         f"jax.debug.print and callbacks out of what is planned ({error}).") from error
    flat = lambda n: jax.tree.structure((0,) * n)
    exported = dataclasses.replace(exported, in_tree=jax.tree.structure(((0,) * len(exported.in_avals), {})),
                                   out_tree=flat(len(exported.out_avals)))
    return bytes(exported.serialize()), identity.digest(exported.mlir_module())


def _exported(export, jitted, traced, args, kwargs):
    make = lambda checks: export.export(jitted, platforms=[topologies.PLATFORM], disabled_checks=checks)(*args, **kwargs)
    try:
        return make(())
    except ValueError as error:
        if "custom call" not in str(error):
            raise
        text = traced.lower(lowering_platforms=(topologies.PLATFORM,)).as_text()  # the child is of the same version: all are safe
        targets = sorted(set(re.findall(r"custom_call @([\w.$]+)", text)))
        return make([export.DisabledSafetyCheck.custom_call(t) for t in targets])


def _elsewhere(program: bytes, request: dict, topology: Topology, path: pathlib.Path | None) -> Compiled:
    """Compiles in a child; or what one made before, kept at `path`."""
    if path and path.is_file():
        with contextlib.suppress(OSError, EOFError, ValueError, TypeError):  # torn, or of another version: made anew
            return Compiled(**json.loads(gzip.decompress(path.read_bytes())), cached=True)
    with tempfile.TemporaryDirectory(prefix="zerojax-") as folder:
        work = pathlib.Path(folder)
        (work / "program").write_bytes(program)
        (work / "request.json").write_text(json.dumps(request))
        _run(work, request, topology)
        answer = (work / "answer.json.gz").read_bytes()
    if path:
        _keep(path, answer)
    return Compiled(**json.loads(gzip.decompress(answer)))


def _cache() -> pathlib.Path:
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(os.environ.get(CACHE_VARIABLE) or pathlib.Path(base) / "zerojax") / "programs"


def _keep(path: pathlib.Path, answer: bytes) -> None:
    """Whole or not at all; a folder that can't be written costs the next plan its time, nothing else."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(answer)
        os.replace(file.name, path)


def _environment() -> dict[str, str]:
    return os.environ | {
        topologies.NO_GPU_VARIABLE: "1", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false",
        "JAX_ENABLE_X64": str(int(has_64_bits())), "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(provenance.PACKAGE.parent), os.environ.get("PYTHONPATH")]))}


def _run(work: pathlib.Path, request: dict, topology: Topology) -> None:
    with open(work / "log", "w+b") as log:
        child = subprocess.Popen([sys.executable, "-m", __name__, str(work)], env=_environment(),
                                 stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            _wait(child, f"compiling for {topology.devices} x {topology.gpu.name}")
        except BaseException:
            child.kill()
            child.wait()
            raise
    if child.returncode:
        raise CompileError(_why(child.returncode, (work / "log").read_text(errors="replace"), request))


def _wait(child: subprocess.Popen, title: str) -> None:
    shown = sys.stderr is not None and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    with tqdm(total=0, desc=title, bar_format="{desc}: {elapsed}", leave=False, disable=not shown) as line:
        while child.poll() is None:
            line.refresh()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)


def _why(status: int, log: str, request: dict) -> str:
    lines = [line for line in log.strip().splitlines() if line.strip()][-8:]
    ended = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    memory = " Out of memory, by the look of it: close what else runs, or plan fewer layers in a scan." if (
        status == -signal.SIGKILL or any(sign in log for sign in ("bad_alloc", "MemoryError", "Cannot allocate memory"))) else ""
    return (f"the compiler process for {request['topology']} ended with {ended}.{memory} Options: {request['options']}. "
            "Its last lines:\n  " + "\n  ".join(lines or ["(none)"]))


def main(folder: str) -> None:
    """The child: `program` and `request.json` in a folder to `answer.json.gz` there."""
    from jax import export

    work = pathlib.Path(folder)
    request = json.loads((work / "request.json").read_text())
    exported = export.deserialize(bytearray((work / "program").read_bytes()))
    names, sizes = zip(*request["mesh"], strict=True)
    mesh = Mesh(np.array(topologies.devices(request["topology"])).reshape(sizes), names, axis_types=(AxisType.Auto,) * len(names))
    spec = lambda entries: P(*(tuple(e) if isinstance(e, list) else e for e in entries))
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, spec(i["spec"])))
            for a, i in zip(exported.in_avals, request["inputs"], strict=True)]
    donated = tuple(n for n, i in enumerate(request["inputs"]) if i["donated"])
    lowered = jax.jit(exported.call, donate_argnums=donated, keep_unused=True).lower(*args)
    start = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options=request["options"])
    except jax.errors.JaxRuntimeError as error:
        sys.exit(str(error))
    answer = {"text": compiled.as_text(), "memory": _memory(compiled), "seconds": time.perf_counter() - start}
    (work / "answer.json.gz").write_bytes(gzip.compress(json.dumps(answer).encode(), 1))


if __name__ == "__main__":
    main(sys.argv[1])
