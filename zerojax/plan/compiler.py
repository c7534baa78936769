"""Compiles a jitted function for the devices at hand, or in a child process for absent GPUs.

An abort of the compiler ends only the child and is an exception here.

    here    jitted --jax.export, over an AbstractMesh--> bytes, with the user's source lines
    child   bytes --deserialize, jit with the same shardings and donation--> the GPU compiler
            -> text, memory figures

Only the child has the environment variable that lets the CUDA plugin start without a GPU.
"""

import contextlib
import dataclasses
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

from zerojax import tables
from zerojax.errors import CompileError, ModelError
from zerojax.layout import topology as topologies
from zerojax.layout.topology import Topology
from zerojax.plan import cache, provenance
from zerojax.precision import has_64_bits

MEMORY = ("argument", "output", "alias", "temp", "generated_code", "host_argument", "host_output",
          "host_alias", "host_temp")
_NO_TILES, _TRITON = "Couldn't find output tile sizes", "xla_gpu_enable_triton_gemm"
_STATUS = re.compile(r"\b(INTERNAL|INVALID_ARGUMENT|UNIMPLEMENTED|RESOURCE_EXHAUSTED|NOT_FOUND"
                     r"|FAILED_PRECONDITION): ")  # XLA's reason, which a stack trace may follow


@dataclasses.dataclass(frozen=True)
class Call:
    """A call to compile.

    Attributes:
      jitted: a `jax.jit`ted function.
      args, kwargs: arrays or `ShapeDtypeStruct`s with shardings over one mesh.
      options: compiler options.
    """

    jitted: Any
    args: Sequence[Any]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def trace(self) -> Any:
        return self.jitted.trace(*self.args, **self.kwargs)

    def inputs(self, traced: Any) -> list[dict]:
        """Returns the spec of each array argument, unused ones included, and whether it is
        donated."""
        given = dict(jax.tree.leaves_with_path((tuple(self.args), dict(self.kwargs))))
        infos = jax.tree.leaves_with_path(traced.args_info, is_leaf=lambda x: hasattr(x, "donated"))
        return [{"spec": _entries(given[path]), "donated": info.donated} for path, info in infos]


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The compiler's answer.

    Attributes:
      text: the optimized, scheduled program.
      memory: the compiler's figures in bytes per device, by the names of `MEMORY`.
      seconds: how long the compiler took.
      added: options without which the compiler failed.
      cached: whether it is the answer of an earlier, identical call.
    """

    text: str
    memory: Mapping[str, int]
    seconds: float
    added: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cached: bool = False


def compile(call: Call, mesh: Mesh | AbstractMesh, *, cached: bool = True) -> Compiled:
    """Compiles a call for the devices of a mesh.

    Args:
      cached: whether the answer for absent GPUs is looked up and kept on disk.

    Raises:
      CompileError: the compiler failed; with its last lines, the options and the exit status.
      ModelError: the function calls back to Python, which cannot be compiled for devices elsewhere.
      PolicyError, MissingExtraError: see `topology.devices`.
    """
    traced = call.trace()
    absent = Topology.of(mesh) if isinstance(mesh, AbstractMesh) else None
    if absent is None:
        return _here(traced, call.options)
    topologies.check_installed()
    request = {"topology": absent.text, "mesh": list(mesh.shape.items()),
               "inputs": call.inputs(traced),
               "options": {**topologies.COMPILER_OPTIONS, **call.options}}
    if not cached:
        return Compiled(**_elsewhere(call, traced, request, absent)[0])
    path = cache.path_of(_lowered(traced), request, absent.gpu.target())
    if answer := cache.load(path):
        return Compiled(**answer, cached=True)
    answer, packed = _elsewhere(call, traced, request, absent)
    cache.keep(path, packed)
    return Compiled(**answer)


def _entries(x: Any) -> list:
    sharding = getattr(x, "sharding", None)
    return list(sharding.spec) if isinstance(sharding, NamedSharding) else []


def _lowered(traced: Any) -> jax.stages.Lowered:
    with _no_callbacks(traced):
        return traced.lower(lowering_platforms=(topologies.PLATFORM,))


def _here(traced: Any, options: Mapping[str, Any]) -> Compiled:
    start = time.perf_counter()
    try:
        compiled = traced.lower().compile(compiler_options=dict(options))
    except jax.errors.JaxRuntimeError as error:
        raise CompileError(
            f"the compiler refused the step, with options {dict(options)}: {error}") from error
    return Compiled(compiled.as_text(), _memory(compiled), time.perf_counter() - start)


def _memory(compiled: Any) -> dict[str, int]:
    stats = compiled.memory_analysis()
    return {name: getattr(stats, f"{name}_size_in_bytes") for name in MEMORY}


def _elsewhere(call: Call, traced: Any, request: dict, topology: Topology) -> tuple[dict, bytes]:
    """Compiles in a child; returns its answer, and the answer packed."""
    with _no_callbacks(traced):
        exported = _exported(call, traced)
    # the user's classes have no place in the child
    flat_in = jax.tree.structure(((0,) * len(exported.in_avals), {}))
    flat_out = jax.tree.structure((0,) * len(exported.out_avals))
    exported = dataclasses.replace(exported, in_tree=flat_in, out_tree=flat_out)
    with tempfile.TemporaryDirectory(prefix="zerojax-") as folder:
        work = pathlib.Path(folder)
        (work / "program").write_bytes(exported.serialize())
        (work / "request.json").write_text(json.dumps(request))
        _run(work, request, topology)
        packed = (work / "answer.json.gz").read_bytes()
    return cache.unpacked(packed), packed


@contextlib.contextmanager
def _no_callbacks(traced: Any):
    """Raises `ModelError` for a program that calls back to Python."""
    try:
        yield
    except (NotImplementedError, ValueError) as error:
        text = str(traced.jaxpr)
        if "callback" not in text and "debug_print" not in text:
            raise
        raise ModelError(
            "the step calls back to Python, which cannot be compiled for absent GPUs; leave "
            f"jax.debug.print and callbacks out of a planned step ({error}).") from error


def _exported(call: Call, traced: Any) -> Any:
    try:
        return _export(call, ())
    except ValueError as error:
        if "custom call" not in str(error):
            raise
        # the child is of the same version: all custom calls are safe
        targets = sorted(set(re.findall(r"custom_call @([\w.$]+)", _lowered(traced).as_text())))
        return _export(call, targets)


def _export(call: Call, targets: Sequence[str]) -> Any:
    from jax import export

    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    made = export.export(call.jitted, platforms=[topologies.PLATFORM], disabled_checks=checks)
    return made(*call.args, **call.kwargs)


def _environment() -> dict[str, str]:
    paths = [str(provenance.PACKAGE.parent), os.environ.get("PYTHONPATH")]
    return os.environ | {
        topologies.NO_GPU_VARIABLE: "1", "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_ENABLE_X64": str(int(has_64_bits())),
        "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


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
        log_text = (work / "log").read_text(errors="replace")
        raise CompileError(_why(child.returncode, log_text, request))


def _wait(child: subprocess.Popen, title: str) -> None:
    with tqdm(total=0, desc=title, bar_format="{desc}: {elapsed}", leave=False,
              disable=not tables.is_watched()) as line:
        while child.poll() is None:
            line.refresh()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(1.0)


def _why(status: int, log: str, request: dict) -> str:
    every = [line for line in log.strip().splitlines() if line.strip()]
    lines = [line for line in every[:-8] if _STATUS.search(line)][:1] + every[-8:]
    ended = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    killed = status == -signal.SIGKILL
    signs = ("bad_alloc", "MemoryError", "Cannot allocate memory")
    memory = (" It probably ran out of memory: close other programs, or plan fewer layers in a "
              "scan."
              if killed or any(sign in log for sign in signs) else "")
    return (f"the compiler process for {request['topology']} ended with {ended}.{memory} "
            f"Options: {request['options']}. From its output:\n  "
            + "\n  ".join(lines or ["(none)"]))


def main(folder: str) -> None:
    """The child: reads `program` and `request.json` in a folder, writes `answer.json.gz` there."""
    from jax import export

    work = pathlib.Path(folder)
    request = json.loads((work / "request.json").read_text())
    exported = export.deserialize(bytearray((work / "program").read_bytes()))
    donated = tuple(n for n, i in enumerate(request["inputs"]) if i["donated"])
    jitted = jax.jit(exported.call, donate_argnums=donated, keep_unused=True)
    lowered = jitted.lower(*_arguments(exported, request))
    start = time.perf_counter()
    try:
        compiled, added = _optimized(lowered, request["options"])
    except jax.errors.JaxRuntimeError as error:
        sys.exit(str(error))
    answer = {"text": compiled.as_text(), "memory": _memory(compiled),
              "seconds": time.perf_counter() - start, "added": added}
    (work / "answer.json.gz").write_bytes(cache.packed(answer))


def _optimized(lowered: jax.stages.Lowered,
               options: Mapping[str, Any]) -> tuple[jax.stages.Compiled, dict[str, Any]]:
    """Compiles, without Triton's products if XLA finds no tiles for one of them (jax 0.10).

    XLA's developers advise this option, or the autotuner, which needs a GPU (openxla/xla#36792).

    Returns:
      The compiled program, and the options that were added.
    """
    try:
        return lowered.compile(compiler_options=dict(options)), {}
    except jax.errors.JaxRuntimeError as error:
        if _NO_TILES not in str(error) or _TRITON in options:
            raise
    added = {_TRITON: False}
    return lowered.compile(compiler_options={**options, **added}), added


def _arguments(exported: Any, request: dict) -> list[jax.ShapeDtypeStruct]:
    names, sizes = zip(*request["mesh"], strict=True)
    devices = np.array(topologies.devices(request["topology"])).reshape(sizes)
    mesh = Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    return [jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, _spec(i["spec"])))
            for a, i in zip(exported.in_avals, request["inputs"], strict=True)]


def _spec(entries: Sequence) -> P:
    return P(*(tuple(e) if isinstance(e, list) else e for e in entries))


if __name__ == "__main__":
    main(sys.argv[1])
