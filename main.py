"""Fine-tune DistilBERT for sentiment, fully or with LoRA, or fit the linear baseline; then compare the runs."""

import gc
import os
import re
import sys

from config import Interrupted, TrainConfig, UserError, parse_args, say, silence


def main(argv: list[str] | None = None) -> int:
    """Run the mode asked for. Returns the exit code: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w", errors="backslashreplace")  # noqa: SIM115, PTH123
    config = parse_args(argv)
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 ends no run
    try:
        dispatch(config)
        print(end="", flush=True)  # what cannot be written is told here, not by Python's own end
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        silence(sys.stdout)
        return 141  # 128 + SIGPIPE
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that cannot be written
        say(f"error: {error}")
        return 2
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        wanted = re.search(r"tried to allocate [\d.]+ \w+", str(error), re.IGNORECASE)
        said = f" ({wanted[0].lower()})" if wanted else ""
        say(f"error: out of memory{said}; try a lower --batch_size or --max_length")
        return 2
    except Interrupted as stop:
        say(str(stop))
        return stop.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


def _is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a class of its own for GPUs, and words for RAM."""
    return "OutOfMemory" in type(error).__name__ or isinstance(error, MemoryError) or "allocate memory" in str(error)


def dispatch(config: TrainConfig) -> None:
    """Import what the mode needs, and nothing else: PyTorch and its friends take seconds."""
    if config.mode == "report":
        from report import report

        report(config)
    elif config.mode == "sweep":
        from sweep import sweep

        sweep(config)
    elif config.mode == "sync":
        upload_copies(config)
    else:
        prepare_imports(config)
        run_model(config)


def upload_copies(config: TrainConfig) -> None:
    """--sync. UserError with the trackers' warnings, if there are any."""
    from tracking import sync

    lines = sync(config.runs[0], wandb=config.wandb, comet=config.comet)
    warnings = [line for line in lines if line.startswith("warning: ")]
    for line in lines:
        if line not in warnings:
            print(line)
    if warnings:
        raise UserError("; ".join(line.removeprefix("warning: ") for line in warnings))


def prepare_imports(config: TrainConfig) -> None:
    """Set what PyTorch, the tokenizers and the hub's clients read from the environment when they are imported."""
    import hub

    if config.mode in ("predict", "merge") and not config.push_to_hub:
        os.environ["HF_HUB_OFFLINE"] = "1"  # a run's model is a folder
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"  # else transformers asks a bot to convert other people's models
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch: large pages; a training step took 79 ms, not 86
    hub.go_offline_if_unreachable()
    if config.push_to_hub:
        hub.check_upload(config.push_to_hub)


def run_model(config: TrainConfig) -> None:
    """--predict, --merge, --baseline or --finetune."""
    if config.mode in ("predict", "merge"):
        import predict

        (predict.predict if config.mode == "predict" else predict.merge)(config)
        return
    import models

    # Before the slower imports, so that a wrong name is told soon; of a resumed run its record says which it was.
    source = None if config.resume else models.find_model(config.model)
    if config.mode == "baseline":
        from baseline import run_baseline

        run_baseline(config, source)
    else:
        from train import finetune

        finetune(config, source)


if __name__ == "__main__":
    gc.set_threshold(100_000)  # with 700 it goes through what the imports make so often that they take 15% longer
    code = main()
    gc.freeze()  # nothing is left to be freed, but it would look at everything once more, for more than a second
    sys.exit(code)
