"""The `zerojax` command: what a training run needs, before it is paid for; starting one; and what it left.

Exit status 1 says that a plan does not fit or is not ZeRO's, or that a checkpoint is damaged; 2, that something went wrong.

    zerojax plan train.py --topology h200:8x8 --stage 3      # one layout, in full; exit status 1 if it is not ZeRO or does not fit
    zerojax advise train.py --topology h200:8x8              # many, the fastest that fits
    zerojax show train.py --topology h200:8x8                # who holds which leaf
    zerojax theory --params 7.5e9 --devices 64               # the paper's table
    zerojax launch -n 2 --devices 4 train.py --steps 100     # processes of one job on this machine; their status
    zerojax inspect checkpoints                              # what a checkpoint says of itself
    zerojax verify checkpoints                               # whether its arrays are those saved
    zerojax export checkpoints --to model.safetensors        # the model, for others
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Sequence

from zerojax.plan import theory
from zerojax.tables import Sheet

GB = 1e9


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; its exit status is 0, 1 for what it was to find out not being so, 2 for an error."""
    args = parser().parse_args(argv)
    if args.run not in (run_theory, run_launch):
        # this process plans: no GPU is taken, and a CUDA compiler without a GPU is no error
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from zerojax.errors import ZeroError

    try:
        return args.run(args)
    except ZeroError as error:
        print(f"zerojax {args.command}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"zerojax {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception:  # of the user's file: it must not read as a plan that failed
        traceback.print_exc()
    return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="zerojax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    plan = _command(commands, "plan", run_plan, "memory, communication and time of one layout, off the GPU compiler")
    _recipe(plan)
    plan.add_argument("--accumulate", type=int, default=1, help="microbatches (default: %(default)s)")
    plan.add_argument("--replica", type=int, default=1, help="copies of the state (default: %(default)s)")
    plan.add_argument("--stage", type=int, default=3, help="of ZeRO, 0 to 3 (default: %(default)s)")
    plan.add_argument("--remat", help="which of the recipe's losses, if it has several (default: the first)")
    plan.add_argument("--hlo", metavar="FILE", type=argparse.FileType("w"), help="write the compiled program there")
    plan.add_argument("--allow", metavar="REGEX", help="findings that are meant to be, as they read")
    advise = _command(commands, "advise", run_advise, "compiles many layouts; the fastest that fits, by the estimate")
    _recipe(advise)
    show = _command(commands, "show", run_show, "the layout: leaf, shape, spec, bytes per device, why one is whole")
    _recipe(show)
    show.add_argument("--stage", type=int, default=3, help="of ZeRO, 0 to 3 (default: %(default)s)")
    show.add_argument("--replica", type=int, default=1, help="copies of the state (default: %(default)s)")
    table = _command(commands, "theory", run_theory, "ZeRO's arithmetic, without a model")
    table.add_argument("--params", type=float, required=True, help="number of parameters, as 7.5e9")
    table.add_argument("--devices", type=int, required=True)
    table.add_argument("--accumulate", type=int, default=1, help="microbatches (default: %(default)s)")
    _launch(_command(commands, "launch", run_launch, "the processes of a job on this machine, one GPU (or some CPU devices) each"))
    inspect = _command(commands, "inspect", run_inspect, "what a checkpoint says of itself: leaves, bytes, digests, versions")
    _checkpoint(inspect)
    verify = _command(commands, "verify", run_verify, "reads every array of every step and compares its digest")
    _checkpoint(verify)
    _export(_command(commands, "export", run_export, "the model as safetensors, streamed"))
    for command in (plan, advise, table, inspect):
        command.add_argument("--json", action="store_true", help="JSON on standard output")
    return top


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    made.set_defaults(run=run)
    return made


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="FILE_OR_MODULE[:NAME]", help="where a zj.Recipe is; the name is `recipe` if left out")
    command.add_argument("--topology", required=True, help="GPU:HOSTSxGPUS_A_HOST, as h200:8x8")
    command.add_argument("--compute", default="bfloat16", help="dtype of the model and the gathers (default: %(default)s)")
    command.add_argument("--reduce", help="dtype of the reductions (default: as --compute)")
    command.add_argument("--min-shard", type=int, default=2**16, help="leaves of fewer elements stay whole (default: %(default)s)")
    command.add_argument("--no-cache", action="store_true", help="compile even if the answer is on disk")


def numbers(text: str) -> list[int]:
    """
    >>> numbers("4,2")
    [4, 2]
    """
    return [int(n) for n in text.split(",")]


def _launch(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", dest="processes", type=numbers, required=True, metavar="N[,M...]",
                         help="how many; after a failure M, where it starts again")
    command.add_argument("--devices", type=int, help="CPU devices of each (default: one GPU each; none there, one CPU device)")
    command.add_argument("--restarts", type=int, default=0, help="how often to start again after a failure (default: %(default)s)")
    command.add_argument("-m", dest="module", action="store_true", help="the script is the name of a module")
    command.add_argument("script", help="which calls zj.initialize() first; it runs under this Python")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="of the script")


def _checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="DIRECTORY", help="of checkpoints, or of one step")
    command.add_argument("--step", type=int, help="one step alone")


def _export(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    command.add_argument("--to", required=True, metavar="FILE", help="as model.safetensors")
    command.add_argument("--dtype", help="of floating arrays, as bfloat16 (default: as saved)")
    command.add_argument("--rename", action="append", default=[], metavar="REGEX=TEXT",
                         help="on names as blocks.mlp.kernel; may be given several times, and is done in order")
    command.add_argument("--only", metavar="REGEX", help="paths to export (default: parameters and model state)")
    command.add_argument("--shard-gb", type=float, default=5.0, help="files of at most so many GB (default: %(default)s)")


def _precision(args):
    from zerojax.policy import Precision

    return Precision(compute=args.compute, reduce=args.reduce)


def run_plan(args) -> int:
    from zerojax import advice, recipe
    from zerojax.errors import PlanError

    found = recipe.load(args.recipe)
    remat = next(iter(found.losses)) if args.remat is None else args.remat
    choice = advice.Choice(args.stage, args.accumulate, remat, args.replica)
    plan = advice.plan_of(found, args.topology, choice, _precision(args), args.min_shard, not args.no_cache)
    if args.hlo:
        args.hlo.write(plan.hlo)
    print(json.dumps(plan.to_dict(), indent=1) if args.json else plan)
    try:
        plan.check(args.allow)
    except PlanError as error:
        print(f"zerojax plan: {error}", file=sys.stderr)
        return 1
    return 0 if plan.fits else 1


def run_advise(args) -> int:
    from zerojax import advice, recipe

    found = advice.advise(recipe.load(args.recipe), args.topology, precision=_precision(args), min_shard=args.min_shard,
                           cache=not args.no_cache)
    if args.json:
        rows = [{"choice": vars(t.choice), "refused": t.refused, "plan": t.plan and t.plan.to_dict()} for t in found.tried]
        print(json.dumps({"best": found.best and vars(found.best.choice), "tried": rows}, indent=1))
    else:
        print(found)
    return 0 if found.best else 1


def run_show(args) -> int:
    from zerojax import recipe
    from zerojax.layout.mesh import make_mesh
    from zerojax.zero import Zero

    found = recipe.load(args.recipe)
    mesh = make_mesh(topology=args.topology, replica=args.replica)
    zero = Zero(mesh, args.stage, precision=_precision(args), min_shard=args.min_shard)
    print(zero.layout(zero.abstract(found.init_fn, found.tx)))
    return 0


def run_theory(args) -> int:
    psi, n = args.params, args.devices
    if not 0 < psi < float("inf") or n < 1 or args.accumulate < 1:
        given = f"--params {psi} --devices {n} --accumulate {args.accumulate}"
        print(f"zerojax theory: {given}: write positive numbers.", file=sys.stderr)
        return 2
    stages = {s: {"paper_bytes": theory.paper_bytes(psi, n, s), "rest_bytes": theory.rest_bytes(psi, n, s),
                  "elements_per_param": theory.wire(s, args.accumulate).elements,
                  "sent_bytes": theory.wire(s, args.accumulate).bytes(psi, n)} for s in range(4)}
    if args.json:
        print(json.dumps({"params": psi, "devices": n, "accumulate": args.accumulate, "stages": stages}, indent=1))
    else:
        rows = [(str(s), f"{x['paper_bytes'] / GB:,.2f} GB", f"{x['rest_bytes'] / GB:,.2f} GB",
                 f"{x['elements_per_param']}", f"{x['sent_bytes'] / GB:,.2f} GB") for s, x in stages.items()]
        print(Sheet(f"{psi:,.4g} parameters, {n} devices, {args.accumulate} microbatch(es): per device",
                    ("stage", "in a step, by the paper (2+2+12 bytes)", "zerojax between steps (4+8 bytes)",
                     "elements sent, a parameter", "sent a step, 16 bit"), tuple(rows)))
    return 0


def run_launch(args) -> int:
    from zerojax.processes import launch

    command = [sys.executable, *["-m"] * args.module, args.script, *args.arguments]
    return launch.launch(launch.Launch(command, args.processes, args.devices, args.restarts))


def run_inspect(args) -> int:
    from zerojax.checkpoint import reading

    note = reading.read_manifest(reading.step_path(args.checkpoint, args.step))
    print(json.dumps(note.to_json(), indent=1) if args.json else note)
    return 0


def run_verify(args) -> int:
    from zerojax.checkpoint import reading
    from zerojax.errors import CorruptCheckpointError
    from zerojax.tables import size

    newest, damaged = reading.step_path(args.checkpoint, args.step), False
    single = args.step is not None or newest == reading.located(args.checkpoint)
    for one in [newest] if single else [newest.parent / str(step) for step in reading.steps(newest.parent)]:
        try:
            note = reading.verify(one)
            print(f"step {note.step}: {len(note.leaves)} leaves, {size(note.bytes)}, as saved", flush=True)
        except CorruptCheckpointError as error:
            damaged = True
            print(f"zerojax verify: {error}", file=sys.stderr)
    return 1 if damaged else 0


def run_export(args) -> int:
    from zerojax.checkpoint import safetensors
    from zerojax.tables import size

    odd = [text for text in args.rename if "=" not in text]
    if odd:
        print(f"zerojax export: --rename {odd[0]!r} has no '='; write REGEX=TEXT.", file=sys.stderr)
        return 2
    rename = dict(text.split("=", 1) for text in args.rename)
    files = safetensors.export_safetensors(args.checkpoint, args.to, step=args.step, dtype=args.dtype, only=args.only or safetensors.MODEL,
                                       rename=rename, shard_bytes=int(args.shard_gb * 1e9))
    for file in files:
        print(f"{file}  {size(file.stat().st_size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
