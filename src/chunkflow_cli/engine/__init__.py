"""The training engine: the only room that imports deepspeed."""

from chunkflow_cli.engine.agreement import all_or_none, gather, own_rank, process_count
from chunkflow_cli.engine.data_parallel import Engine
from chunkflow_cli.engine.distributed import (
    PATIENCE,
    Processes,
    broadcast_from_first,
    close_process_group,
    import_deepspeed,
    init_process_group,
    join_processes,
)
from chunkflow_cli.engine.interface import TrainingEngine
from chunkflow_cli.engine.optimizers import check_optimizer
from chunkflow_cli.engine.settings import EngineSettings, check_pipeline_settings, check_settings, deepspeed_config
from chunkflow_cli.engine.stage import PipelineEngine
from chunkflow_cli.engine.state_files import StateFiles

__all__ = [
    "PATIENCE",
    "Engine",
    "EngineSettings",
    "PipelineEngine",
    "Processes",
    "StateFiles",
    "TrainingEngine",
    "all_or_none",
    "broadcast_from_first",
    "check_optimizer",
    "check_pipeline_settings",
    "check_settings",
    "close_process_group",
    "deepspeed_config",
    "gather",
    "import_deepspeed",
    "init_process_group",
    "join_processes",
    "own_rank",
    "process_count",
]
