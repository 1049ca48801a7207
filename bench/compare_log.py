"""What a trainer logged to TensorBoard: shared by compare_verl.py and compare_openrlhf.py."""

from pathlib import Path

Log = dict[str, list[tuple[float, float]]]  # name -> (seconds since the epoch when it was logged, value), a round each


def read(folder: Path) -> Log:
    """All scalars under `folder`.

    Raises:
        ValueError: no event file, or more than one.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    files = list(folder.rglob("*tfevents*"))
    if len(files) != 1:
        raise ValueError(f"want one file of TensorBoard events under {folder}, got {len(files)}")
    events = EventAccumulator(str(files[0]), size_guidance={"scalars": 0}).Reload()
    return {name: [(e.wall_time, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
