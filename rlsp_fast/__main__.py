"""The command line: `rlsp VERB ...` or `python -m rlsp_fast VERB ...`; under torchrun, `-m rlsp_fast VERB ...`."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from rlsp_fast import __version__
from rlsp_fast import config as configs
from rlsp_fast.reward import RewardError

_EPILOG = """\
Settings are a recipe (a TOML or YAML file, or the name of a shipped one) and dotted.key=value overrides:
  rlsp demo train.steps=20
  torchrun --nproc-per-node 8 -m rlsp_fast run llama-3.1-8b-math-paper model.path=/models/Llama-3.1-8B-Instruct
`rlsp config` lists every key. --dry-run prints the resolved config and stops.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb. Returns the exit code: 0, 2 for a user's mistake, 3 for numbers that cannot be trained on, 4 when a
    detector stopped the run, 130 after Ctrl-C."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(word.startswith("-") or "=" not in word for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse gives up on key=value words that stand behind an option
        args.overrides = [*args.overrides, *rest]
    try:
        return args.verb(args)
    except KeyboardInterrupt:
        return 130
    except RewardError as error:  # of one response, so of one rank
        return _fail(str(error), 2, every_rank=True)
    except ValueError as error:  # every other mistake of a user is a ValueError of ours; a bug's traceback must stay visible
        if not type(error).__module__.startswith("rlsp_fast"):
            raise
        return _fail(str(error), 2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rlsp",
        description="Reinforcement learning via self-play: SFT on reasoning, then PPO on vLLM rollouts.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, run: object, help: str) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=help, description=help)
        sub.set_defaults(verb=run)
        return sub

    def recipe(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("recipe", help="a .toml or .yaml file, or the name of a shipped recipe")
        sub.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. train.steps=20")
        sub.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")

    recipe(verb("run", _stages(sft=True, rl=True), "the whole method: evaluate, SFT, PPO, evaluate, report"))
    recipe(verb("sft", _stages(sft=True, rl=False), "supervised fine-tuning on demonstrations only"))
    recipe(verb("train", _stages(sft=False, rl=True), "PPO from model.path, without SFT"))
    recipe(verb("eval", _eval, "accuracy and length of model.path on data.validation"))
    plan = verb("plan", _plan, "memory by phase and seconds of a step, before anything is loaded; exit code 1: it does not fit")
    plan.add_argument("recipe", help="a .toml or .yaml file, or the name of a shipped recipe")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. rollout.kv_cache_gib=8")
    plan.add_argument("--gpus", type=int, default=8, metavar="N", help="GPUs of a node (default 8)")
    plan.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes (default 1)")
    plan.add_argument("--gpu", default="H100", metavar="NAME", help="A100-80, H100 (default), H200 or B200")
    plan.add_argument("--gpu-memory", metavar="SIZE", help="of one GPU, e.g. 80GiB (default: the GPU's)")
    plan.add_argument("--prompt-tokens", type=int, metavar="N", help="mean, for times (default 256)")
    plan.add_argument("--response-tokens", type=int, metavar="N", help="mean, for times (default: half of the limit)")
    plan.add_argument("--json", action="store_true", help="print it as JSON")
    doctor = verb("doctor", _doctor, "whether training can start on this machine; exit code 1 when not")
    doctor.add_argument("recipe", nargs="?", help="look at what this recipe needs, too")
    doctor.add_argument("overrides", nargs="*", metavar="key=value", help="dotted keys, e.g. model.path=/models/mine")
    demo = verb("demo", _demo, "train a small transformer from scratch on this machine, a CPU will do")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of the demo recipe")
    demo.add_argument("--seed", type=int, default=0, help="of model, demonstrations, order and sampling (default 0)")
    demo.add_argument("--full", action="store_true", help="the longer recipe: more steps of SFT and RL")
    demo.add_argument("--dry-run", action="store_true", help="print the resolved config and stop")
    report = verb("report", _report, "print the table and redraw the curves of a finished or running run")
    report.add_argument("dir", type=Path, help="the run's output.dir")
    check = verb("verify", _verify, "grade a file of responses with the outcome verifier")
    check.add_argument("file", help='JSONL rows {"gold": ..., "response": ...}; - reads standard input')
    check.add_argument("--out", default="-", help="where rows with `verdict` and `seconds` go (default: standard output)")
    mode = check.add_mutually_exclusive_group()
    mode.add_argument("--strict", dest="mode", action="store_const", const="strict", help="the answer must be boxed")
    mode.add_argument("--lenient", dest="mode", action="store_const", const="lenient", help="a box is not required")
    check.set_defaults(mode="strict")
    check.add_argument("--timeout", type=_positive(float), default=5.0, metavar="SECONDS", help="limit of one verification")
    check.add_argument("--workers", type=_positive(int), default=2, metavar="N", help="verifier processes")
    of_data = verb("data", None, "work on problem sets: decontaminate").add_subparsers(required=True, metavar="VERB")
    text = "leave out training problems that overlap evaluation problems, with a report of each and why"
    apart = of_data.add_parser("decontaminate", help=text, description=text)
    apart.set_defaults(verb=_decontaminate)
    apart.add_argument("train", nargs="+", metavar="TRAIN", help="sources as in data.train: files, hf:..., reasoning-gym:...")
    apart.add_argument("--against", nargs="+", required=True, metavar="EVAL", help="evaluation sets, same forms")
    apart.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl", help="where the rows that overlap none go")
    apart.add_argument("--report", type=Path, metavar="REPORT.jsonl", help="where the others go (default: OUT.removed.jsonl)")
    apart.add_argument("--ngram", type=int, default=13, metavar="N", help="tokens of an n-gram (default 13)")
    apart.add_argument(
        "--threshold", type=float, default=0.5, metavar="SHARE",
        help="of an evaluation problem's tokens, covered by shared n-grams (default 0.5); 0: any shared n-gram",
    )  # fmt: skip
    apart.add_argument("--prompt-key", metavar="COLUMN", help="column with the problem, where it has a name of its own")
    gguf = verb("import-gguf", _import_gguf, "turn a GGUF model into a Hugging Face folder")
    gguf.add_argument("source", help="a .gguf file, or an installed package that holds one")
    gguf.add_argument("out", type=Path, help="folder to write")
    verb("config", _config, "every setting with its default and meaning, as Markdown")
    return parser


def _positive(kind: type) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"want more than 0, got {text}")
        return value

    parse.__name__ = kind.__name__  # argparse names it when the text is no number
    return parse


def _stages(*, sft: bool, rl: bool) -> object:
    def go(args: argparse.Namespace) -> int:
        config = configs.load(args.recipe, args.overrides)
        if sft and not rl and not config.wants_sft:
            raise configs.ConfigError("sft.steps and sft.epochs are 0: set one of them")
        if rl and not config.train.steps and not (sft and config.wants_sft):
            raise configs.ConfigError("train.steps is 0: there is nothing to train")
        return _go(config, args.dry_run, sft=sft, rl=rl and config.train.steps > 0)

    return go


def _eval(args: argparse.Namespace) -> int:
    config = configs.load(args.recipe, args.overrides)
    if not config.data.validation:
        raise configs.ConfigError("data.validation is empty: name the problems to evaluate on")
    return _go(config, args.dry_run, sft=False, rl=False)


def _go(config: configs.Config, dry_run: bool, *, sft: bool, rl: bool) -> int:
    if dry_run:
        print(configs.dump(config), end="")
        return 0
    from rlsp_fast import dist, memory, sync, train  # torch loads here, after every mistake in the settings has been reported

    try:
        train.run(config, with_sft=sft, with_rl=rl)
    except train.Interrupted as stop:
        return _fail(str(stop), 130)
    except train.AlarmedError as alarm:
        return _fail(str(alarm), 4)
    except (sync.StaleWeightsError, train.DivergedError, memory.MemoryGrowthError) as error:
        return _fail(str(error), 3)
    except (dist.HungRankError, memory.DeviceMemoryError) as error:
        _fail(str(error), 3, every_rank=True)
        os._exit(3)  # leaving the process group in order would wait for the rank that hangs, or for this one
    finally:
        dist.cleanup()
    return 0


def _plan(args: argparse.Namespace) -> int:
    from rlsp_fast import plan, shapes

    config = configs.load(args.recipe, args.overrides)
    memory = plan.parse_memory(args.gpu_memory) if args.gpu_memory else None
    job = plan.make_job(
        config, shapes.read(config.model.path), gpu=args.gpu, num_gpus=args.gpus, num_nodes=args.nodes, memory=memory,
        prompt_tokens=args.prompt_tokens, response_tokens=args.response_tokens,
    )  # fmt: skip
    if args.json:
        print(plan.as_json(job))
    else:
        plan.show(job)
    return 0 if plan.fits(job) else 1


def _doctor(args: argparse.Namespace) -> int:
    from rlsp_fast import doctor

    config = configs.load(args.recipe, args.overrides) if args.recipe else None
    return doctor.report(doctor.examine(config))


def _demo(args: argparse.Namespace) -> int:
    name = "demo-full" if args.full else "demo"
    folder = Path("outputs") / (name if args.seed == 0 else f"{name}-seed{args.seed}")
    places = [
        f"model.path={folder / 'start'}",
        f"data.train={folder / 'problems.jsonl'}",
        f"data.validation={folder / 'held_out.jsonl'}",
        f"sft.train={folder / 'demonstrations.jsonl'}",
        f"sft.validation={folder / 'demonstrations_validation.jsonl'}",
        f"output.dir={folder / 'run'}",
    ]
    config = configs.load(name, [*places, *args.overrides, f"train.seed={args.seed}"])
    if not args.dry_run:
        from rlsp_fast import demo, dist, log

        dist.setup()
        log.setup()
        if dist.rank() == 0:
            demo.prepare(folder, config)
        dist.barrier()
    return _go(config, args.dry_run, sft=True, rl=True)


def _report(args: argparse.Namespace) -> int:
    from rlsp_fast.report import write_report

    path = args.dir / "config.toml"
    if not path.is_file():
        raise configs.ConfigError(f"{args.dir}: no config.toml there, so it is no run's output.dir")
    write_report(args.dir, configs.load(str(path)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from rlsp_fast.verifier import verify_file

    verify_file(args.file, args.out, mode=args.mode, timeout_s=args.timeout, workers=args.workers)
    return 0


def _decontaminate(args: argparse.Namespace) -> int:
    from rlsp_fast.decontaminate import clean, print_summary

    summary = clean(
        args.train, args.against, args.out, args.report,
        ngram=args.ngram, threshold=args.threshold, prompt_key=args.prompt_key,
    )  # fmt: skip
    print_summary(summary, args.out)
    return 0


def _import_gguf(args: argparse.Namespace) -> int:
    from rlsp_fast.convert import import_gguf

    print(import_gguf(args.source, args.out))
    return 0


def _config(args: argparse.Namespace) -> int:
    print(configs.reference(), end="")
    return 0


def _fail(message: str, code: int, *, every_rank: bool = False) -> int:
    """One message: from the first rank of each node, since all found the same mistake, or from the rank it happened on."""
    rank = os.environ.get("RANK", "0")
    if every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
        where = f" (rank {rank})" if every_rank and rank != "0" else ""
        print(f"rlsp: {message}{where}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
