"""A toy model for tests of the engine and of checkpoints: a two-layer Qwen2 with LoRA, a whole-trained head, and a
linear layer that only even steps use. Also starts a test file again as several ranks."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from sft import engine
from sft.config import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
PYTHONPATH = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))  # of a child
TOTAL_STEPS, ACCUMULATION, SAMPLES_PER_MICRO_BATCH = 6, 2, 2
ZERO = {"overlap_comm": False, "reduce_bucket_size": 100_000, "allgather_bucket_size": 100_000}


class Toy(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model
        from transformers import Qwen2Config, Qwen2ForCausalLM

        shape = Qwen2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            vocab_size=50,
            attn_implementation="eager",  # bit by bit the same on a GPU, too
        )
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], lora_dropout=dropout)
        self.language_model = get_peft_model(Qwen2ForCausalLM(shape), lora)
        self.head = nn.Linear(32, 3)  # 3 outputs: with 2 ranks ZeRO-3 has to pad its bias
        self.idle = nn.Linear(3, 5)
        self.register_buffer("offset", torch.full((1,), 1 / 3))

    def forward(self, tokens: Tensor, step: int) -> Tensor:
        states = self.language_model.base_model.model.model(input_ids=tokens).last_hidden_state  # B T 32
        out = self.head(states).float() + self.offset  # B T 3
        if step % 2 == 0:
            out = out + self.idle(states[..., :3]).float().mean(-1, keepdim=True)
        return (out - torch.nn.functional.one_hot(tokens % 3, 3)).square().mean()


def config(directory: Path, stage: int = 2, offload: bool = False, **settings) -> TrainConfig:
    """A TrainConfig whose DeepSpeed JSON is written into `directory`."""
    zero = ZERO | {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    path = directory / f"zero{stage}{'_offload' if offload else ''}.json"
    whole = path.with_suffix(f".{os.getpid()}")  # ranks write the same file while others read it
    whole.write_text(json.dumps({"zero_optimization": zero}))
    whole.replace(path)
    defaults = {
        "deepspeed_config": str(path),
        "gradient_accumulation_steps": ACCUMULATION,
        "batch_size": SAMPLES_PER_MICRO_BATCH,
        "learning_rate": 1e-2,
        "warmup_ratio": 0.3,
        "weight_decay": 0.01,
    }
    return TrainConfig(**defaults | settings)


def build(settings: TrainConfig, ranks: engine.Ranks, other_start: bool = False, dropout: float = 0.0) -> engine.Engine:
    """An engine on the same frozen weights; `other_start` perturbs the trainable ones."""
    torch.manual_seed(0)
    model = Toy(dropout)
    if other_start:
        for parameter in model.parameters():
            parameter.data += 0.1 * parameter.requires_grad
    model.train()
    torch.manual_seed(1000 * other_start + ranks.rank)
    return engine.initialize(model, param_groups(model), settings, ranks, TOTAL_STEPS)


def param_groups(model: nn.Module) -> list[dict]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for name, p in named if "lora_" in name]},
        {"params": [p for name, p in named if "lora_" not in name], "lr": 3e-3},
    ]


def tokens(step: int, micro: int, ranks: engine.Ranks, per_rank: int) -> Tensor:
    """This rank's share of a micro-batch; all ranks together see the same samples whatever their number."""
    generator = torch.Generator().manual_seed(100 * step + micro)
    everything = torch.randint(0, 50, (per_rank * ranks.world_size, 7), generator=generator)
    return everything[ranks.rank * per_rank : (ranks.rank + 1) * per_rank].to(ranks.device)


def train(ds_engine: engine.Engine, settings: TrainConfig, ranks: engine.Ranks, steps: range) -> list[float]:
    """Returns this rank's loss of every micro-batch."""
    losses = []
    for step in steps:
        for micro in range(settings.gradient_accumulation_steps):
            loss = ds_engine(tokens(step, micro, ranks, settings.batch_size), step)
            ds_engine.backward(loss)
            ds_engine.step()
            losses.append(loss.item())
    return losses


def run_ranks(file: str, *arguments: str, world_size: int = 2) -> list[str]:
    """Runs `python FILE ARGUMENTS` once per rank; gives what each printed, and shows it if one fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in place.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, file, *arguments]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **output))
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    ended = enumerate(zip(processes, outputs, strict=True))  # a rank that fails takes the others with it: show all
    failed = [f"rank {rank}:\n{output[-4000:]}" for rank, (process, output) in ended if process.returncode]
    assert not failed, "\n".join(failed)
    return outputs
