"""Where a checkpoint's run was in its data, for the same number of processes or another one."""

import json
from pathlib import Path

import grain
import jax

from prosparse_jax.errors import CheckpointError, DataError


def restore_position(checkpoint: Path, data_iterator: grain.DatasetIterator) -> None:
    """Sets the iterator to what the process of the same number has saved.

    Grain writes one file for each process. Where another number of processes goes on, all take the position of process
    0, and the iterator decides whether it can continue from that.
    """
    index, count = jax.process_index(), jax.process_count()
    own = checkpoint / "data" / f"process_{index}-of-{count}.json"
    try:
        path = own if own.exists() else next((checkpoint / "data").glob("process_0-of-*.json"))
        state = json.loads(path.read_text())
    except (OSError, StopIteration, ValueError) as error:
        raise CheckpointError(f"{checkpoint} is damaged: its data position cannot be read: {error!r}") from error
    try:
        data_iterator.set_state(state)
    except (DataError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"the data position in {checkpoint} does not fit this data pipeline or number of processes: {error}"
        ) from error
