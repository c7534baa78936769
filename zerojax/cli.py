"""The `zerojax` command: plans a training run, starts its processes, and reads its checkpoints.

The exit status is 1 if a plan does not fit or is not ZeRO, or if a checkpoint is damaged, and 2
after an error.

    zerojax plan train.py --topology h200:8x8 --stage 3      # one layout in detail
    zerojax advise train.py --topology h200:8x8              # finds the fastest layout that fits
    zerojax tune train.py --topology h200:8x8                # options that hide the network
    zerojax show train.py --topology h200:8x8                # the placement of each leaf
    zerojax gpus                                             # the GPUs that can be simulated
    zerojax theory --params 7.5B --devices 64                # the paper's table
    zerojax launch -n 2 --devices 4 train.py --steps 100     # starts the processes of a job
    zerojax inspect checkpoints                              # leaves, bytes, digests, versions
    zerojax verify checkpoints                               # compares arrays with their digests
    zerojax export checkpoints --to model.safetensors        # writes the model for other programs
"""

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence

import zerojax
from zerojax import arguments, tables
from zerojax.plan import theory

_DEFAULT = "(default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    The status is 0 for success, 1 for a failed check, 2 for an error and 130 for an interrupt;
    `launch` returns the status of its job.
    """
    args = parser().parse_args(argv)
    if args.run not in (run_theory, run_launch, run_gpus):
        # this process only plans: it takes no GPU, and the CUDA compiler may lack one
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    from zerojax.errors import ZeroError

    try:
        return args.run(args)
    except ZeroError as error:
        print(f"zerojax {args.command}: {error}", file=sys.stderr)
    except BrokenPipeError:  # the reader of standard output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(f"zerojax {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception:  # from the user's file; status 1 would read as a plan that failed its check
        traceback.print_exc()
    return 2


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line; `args.run` is the function of the command."""
    top = argparse.ArgumentParser(prog="zerojax", description=__doc__,
                                  formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"zerojax {zerojax.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _plan(_command(commands, "plan", run_plan,
                   "predicts memory, communication and time of one layout, with the GPU compiler"))
    _advise(_command(commands, "advise", run_advise,
                     "compiles many layouts and finds the fastest that fits, by the estimate"))
    _tune(_command(commands, "tune", run_tune,
                   "compiles one layout with several compiler options and finds the fastest"))
    _show(_command(commands, "show", run_show,
                   "prints the layout: leaf, shape, spec, bytes per device, why a leaf is whole"))
    _gpus(_command(commands, "gpus", run_gpus,
                   "lists the GPUs that --topology can name, or describes one of them"))
    _theory(_command(commands, "theory", run_theory,
                     "prints ZeRO's arithmetic, without a model"))
    _launch(_command(commands, "launch", run_launch,
                     "starts a job's processes on this machine, with one GPU or some CPU devices "
                     "each"))
    _inspect(_command(commands, "inspect", run_inspect,
                      "prints the manifest of a checkpoint: leaves, bytes, digests, versions"))
    _checkpoint(_command(commands, "verify", run_verify,
                         "reads every array of every step and compares its digest"))
    _export(_command(commands, "export", run_export, "streams the model to safetensors files"))
    return top


def _command(commands, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    command.set_defaults(run=run)
    return command


def _plan(command: argparse.ArgumentParser) -> None:
    _recipe(command)
    _layout(command)
    _loss(command)
    command.add_argument("--hlo", metavar="FILE", type=argparse.FileType("w"),
                         help="write the compiled program to this file")
    command.add_argument("--allow", metavar="REGEX", help="findings to accept, by their text")
    _json(command)


def _advise(command: argparse.ArgumentParser) -> None:
    _recipe(command)
    _json(command)


def _tune(command: argparse.ArgumentParser) -> None:
    _recipe(command)
    _layout(command)
    _loss(command)
    command.add_argument("--profile-to", metavar="FILE.pbtxt",
                         help="copy the profile of the fastest options to this file")
    _json(command)


def _show(command: argparse.ArgumentParser) -> None:
    _recipe(command)
    _layout(command)


def _gpus(command: argparse.ArgumentParser) -> None:
    command.add_argument("gpu", nargs="?",
                         help="the name of one GPU, or a JSON file; with --json, all its fields")
    _json(command)


def _theory(command: argparse.ArgumentParser) -> None:
    command.add_argument("--params", type=arguments.count, required=True,
                         help="number of parameters, such as 7.5B, 350M or 7.5e9")
    command.add_argument("--devices", type=int, required=True, help="number of devices")
    _accumulate(command)
    _json(command)


def _launch(command: argparse.ArgumentParser) -> None:
    command.add_argument("-n", dest="processes", type=arguments.numbers, required=True,
                         metavar="N[,M...]",
                         help="number of processes; after a failure, the job restarts with M")
    command.add_argument("--devices", type=int,
                         help="CPU devices per process (default: one GPU, or one CPU device on a "
                              "machine without GPUs)")
    command.add_argument("--restarts", type=int, default=0,
                         help=f"number of restarts after failures {_DEFAULT}")
    command.add_argument("--grace", type=float, default=4.0, metavar="SECONDS",
                         help="seconds in which the processes may save and end after SIGTERM or "
                              f"Ctrl-C, before they are killed {_DEFAULT}")
    command.add_argument("-m", dest="module", action="store_true",
                         help="the script is the name of a module")
    command.add_argument("script", help="a script that calls zj.initialize() first; it runs with "
                                        "this Python interpreter")
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script")


def _inspect(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    _json(command)


def _export(command: argparse.ArgumentParser) -> None:
    _checkpoint(command)
    command.add_argument("--to", required=True, metavar="FILE", help="such as model.safetensors")
    command.add_argument("--dtype", help="dtype of floating-point arrays, such as bfloat16 "
                                         "(default: the saved dtype)")
    command.add_argument("--rename", action="append", default=[], metavar="REGEX=TEXT",
                         help="a substitution on names such as blocks.mlp.kernel; may be repeated, "
                              "and applies in order")
    command.add_argument("--only", metavar="REGEX",
                         help="paths to export (default: parameters and model state)")
    command.add_argument("--shard-gb", type=float, default=5.0,
                         help=f"maximum size of a file, in GB {_DEFAULT}")


def _recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", metavar="FILE_OR_MODULE[:NAME]",
                         help="where a zj.Recipe is defined; NAME is `recipe` by default")
    command.add_argument("--topology", required=True,
                         help="GPU:HOSTSxGPUS_PER_HOST, such as h200:8x8; `zerojax gpus` lists "
                              "the names; GPU can also be a JSON file")
    command.add_argument("--compute", default="bfloat16",
                         help=f"dtype of the model and the gathers {_DEFAULT}")
    command.add_argument("--reduce", help="dtype of the reductions (default: same as --compute)")
    command.add_argument("--min-shard", type=int, default=2**16,
                         help=f"leaves with fewer elements stay whole {_DEFAULT}")
    command.add_argument("--no-cache", action="store_true",
                         help="compile even if the result is cached on disk")


def _layout(command: argparse.ArgumentParser) -> None:
    command.add_argument("--stage", type=int, default=3, help=f"ZeRO stage, 0 to 3 {_DEFAULT}")
    command.add_argument("--replica", type=int, default=1, help=f"copies of the state {_DEFAULT}")


def _accumulate(command: argparse.ArgumentParser) -> None:
    command.add_argument("--accumulate", type=int, default=1,
                         help=f"number of microbatches {_DEFAULT}")


def _loss(command: argparse.ArgumentParser) -> None:
    _accumulate(command)
    command.add_argument("--remat", metavar="LOSS",
                         help="name of the loss, if the recipe has several (default: the first)")


def _checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument("checkpoint", metavar="DIRECTORY",
                         help="a directory of checkpoints, or the directory of one step")
    command.add_argument("--step", type=int,
                         help="a single step, if DIRECTORY is a directory of checkpoints")


def _json(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON to standard output")


def run_plan(args) -> int:
    """Prints the plan of one layout; the status is 1 if it does not fit or is not ZeRO."""
    from zerojax import advice
    from zerojax.errors import PlanError

    recipe = _load(args)
    remat = next(iter(recipe.losses)) if args.remat is None else args.remat
    choice = advice.Choice(args.stage, args.accumulate, remat, args.replica)
    plan = advice.plan_of(recipe, args.topology, choice, **_settings(args))
    if args.hlo:
        args.hlo.write(plan.hlo)
    _print(args, plan)
    try:
        plan.check(args.allow)
    except PlanError as error:
        print(f"zerojax plan: {error}", file=sys.stderr)
        return 1
    return 0 if plan.fits else 1


def run_advise(args) -> int:
    """Prints the plans of many layouts; the status is 1 if none fits."""
    from zerojax import advice

    found = advice.advise(_load(args), args.topology, **_settings(args))
    _print(args, found)
    return 0 if found.best else 1


def run_tune(args) -> int:
    """Prints the plans of several compiler options; the status is 1 if none is accepted."""
    from zerojax import tuning

    found = tuning.tune(_load(args), args.topology, stage=args.stage, accumulate=args.accumulate,
                        replica=args.replica, remat=args.remat, profile_to=args.profile_to,
                        **_settings(args))
    _print(args, found)
    return 0 if found.best else 1


def _settings(args) -> dict:
    return {"precision": _precision(args), "min_shard": args.min_shard, "cache": not args.no_cache}


def _print(args, found) -> None:
    print(json.dumps(found.to_dict(), indent=1) if args.json else found)


def run_show(args) -> int:
    """Prints the layout of the recipe's state."""
    from zerojax.layout.mesh import make_mesh
    from zerojax.zero import Zero

    recipe = _load(args)
    mesh = make_mesh(topology=args.topology, replica=args.replica)
    zero = Zero(mesh, args.stage, precision=_precision(args), min_shard=args.min_shard)
    state = zero.abstract(recipe.init_fn, recipe.tx, trainable=recipe.trainable)
    print(zero.layout(state))
    return 0


def _load(args):
    """Returns the recipe.

    Its folder stays on the search path of this process, as for `python train.py`, because the
    recipe's functions may import from it when they are called.
    """
    from zerojax import recipe

    sys.path.insert(0, recipe.folder(args.recipe))
    return recipe.load(args.recipe)


def _precision(args):
    from zerojax.precision import Precision

    return Precision(compute=args.compute, reduce=args.reduce)


def run_gpus(args) -> int:
    """Prints the GPUs that can be simulated, or one of them."""
    from zerojax.layout import gpus

    chosen = gpus.GPUS if args.gpu is None else {args.gpu: gpus.find(args.gpu)}
    if args.json:
        fields = {name: gpus.to_json(gpu) for name, gpu in chosen.items()}
        print(json.dumps(fields if args.gpu is None else fields.popitem()[1], indent=1))
    else:
        print(tables.text(*gpus.sheet(chosen).parts(), gpus.OWN))
    return 0


def run_theory(args) -> int:
    """Prints the paper's table."""
    params, devices, accumulate = args.params, args.devices, args.accumulate
    if devices < 1 or accumulate < 1:
        print(f"zerojax theory: --devices {devices} --accumulate {accumulate}: write positive "
              "integers.", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps({"params": params, "devices": devices, "accumulate": accumulate,
                          "stages": theory.figures(params, devices, accumulate)}, indent=1))
    else:
        print(theory.sheet(params, devices, accumulate))
    return 0


def run_launch(args) -> int:
    """Runs a job on this machine and returns its status."""
    from zerojax.processes import launch

    command = [sys.executable, *["-m"] * args.module, args.script, *args.arguments]
    return launch.launch(launch.Launch(command, args.processes, args.devices, args.restarts,
                                       args.grace))


def run_inspect(args) -> int:
    """Prints the manifest of a checkpoint."""
    from zerojax.checkpoint import directory, reading

    manifest = reading.read_manifest(directory.step_path(args.checkpoint, args.step))
    print(json.dumps(manifest.to_json(), indent=1) if args.json else manifest)
    return 0


def run_verify(args) -> int:
    """Compares arrays with their digests, step by step; the status is 1 if one differs."""
    from zerojax.checkpoint import reading
    from zerojax.errors import CorruptCheckpointError
    from zerojax.tables import quantity, size

    damaged = False
    for path in _steps(args):
        try:
            manifest = reading.verify(path)
            print(f"step {manifest.step}: {quantity(len(manifest.leaves), 'leaf')}, "
                  f"{size(manifest.bytes)}, intact", flush=True)
        except CorruptCheckpointError as error:
            damaged = True
            print(f"zerojax verify: {error}", file=sys.stderr)
    return 1 if damaged else 0


def _steps(args) -> list:
    """Returns the path of the selected step, or the paths of all steps."""
    from zerojax.checkpoint import directory

    newest = directory.step_path(args.checkpoint, args.step)
    if args.step is not None or newest == directory.located(args.checkpoint):
        return [newest]
    return [newest.parent / str(step) for step in directory.steps(newest.parent)]


def run_export(args) -> int:
    """Writes the model as safetensors, and prints the files."""
    from zerojax.checkpoint import exporting
    from zerojax.tables import size

    invalid = [text for text in args.rename if "=" not in text]
    if invalid:
        print(f"zerojax export: --rename {invalid[0]!r} has no '='; write REGEX=TEXT.",
              file=sys.stderr)
        return 2
    rename = dict(text.split("=", 1) for text in args.rename)
    files = exporting.export_safetensors(args.checkpoint, args.to, step=args.step,
                                         dtype=args.dtype, rename=rename,
                                         only=args.only,
                                         shard_bytes=int(args.shard_gb * 1e9))
    for file in files:
        print(f"{file}  {size(file.stat().st_size)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
