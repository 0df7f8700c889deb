"""In the environment of NeMo-Aligner 0.7.0: its own client, data set and arithmetic on an exported folder. Prints what they gave, as JSON.

Run by tests/aligner/test_nemo_aligner.py: python theirs.py CASE.json RESULT.json
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def rewards(case: dict[str, Any]) -> dict[str, Any]:
    """Send rows as RemoteGPTRMClient does: padded with 0, lengths [B, 1]."""
    import numpy as np
    from nemo_aligner.servers.http_communicator import HTTPCommunicator

    communicator = HTTPCommunicator.create_http_communicator_from_dict({"reward_model": ("localhost", case["port"])})
    rows = case["rows"]
    tokens = np.zeros((len(rows), case["pad_to"]), np.int64)
    for row, ids in enumerate(rows):
        tokens[row, : len(ids)] = ids
    data = {"tokens": tokens, "sequence_lengths": np.array([[len(ids)] for ids in rows], np.int64)}
    answer = communicator.send_data_to_server("reward_model", data).result()["rewards"]
    start = time.perf_counter()
    for _ in range(20):
        communicator.send_data_to_server("reward_model", data).result()
    per_call_s = (time.perf_counter() - start) / 20
    tokens[:, 0] = 7
    try:
        communicator.send_data_to_server("reward_model", data).result()
        error = ""
    except Exception as refused:
        error = str(refused)
    communicator.close()
    return {"rewards": answer.tolist(), "dtype": str(answer.dtype), "per_call_s": per_call_s, "unknown_prompt": error}


def settings(case: dict[str, Any]) -> dict[str, Any]:
    """Return the config that Hydra makes of the exported words: on NeMo-Aligner's own, where its repository is there."""
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    for name, function in (("multiply", lambda a, b: a * b), ("int_div", lambda a, b: a // b), ("subtract", lambda a, b: a - b)):
        OmegaConf.register_new_resolver(name, function, replace=True)
    words = (Path(case["folder"]) / "overrides.txt").read_text().splitlines()
    with initialize_config_dir(f"{case['repo']}/examples/nlp/gpt/conf", version_base=None):
        config = compose("gpt_reinforce_actor", overrides=words)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    return plain  # type: ignore[return-value]


def data_set(case: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what RLHFDataset gives for each prompt of each split, with NeMo's tokenizer."""
    from nemo.collections.common.tokenizers.huggingface.auto_tokenizer import AutoTokenizer
    from nemo_aligner.data.nlp.builders import build_train_valid_test_rlhf_datasets
    from omegaconf import OmegaConf

    folder, size = Path(case["folder"]), case["seq_length"]
    prefix = {split: [str(folder / f"{split}.jsonl")] for split in ("train", "validation", "test")}
    data = {"data_impl": "jsonl", "splits_string": None, "seq_length": size, "data_prefix": prefix}
    config = OmegaConf.create({"data": data})
    splits = build_train_valid_test_rlhf_datasets(
        cfg=config, data_prefix=config.data.data_prefix, data_impl="jsonl", splits_string=None, train_valid_test_num_samples=[-1, -1, -1],
        seq_length=size, seed=1, tokenizer=AutoTokenizer(str(folder / "tokenizer")),
    )  # fmt: skip
    items = [split[index] for split in splits for index in range(len(split))]
    return [{**item, "text": item["text"].tolist(), "loss_multiplier": bool(item["loss_multiplier"])} for item in items]


def arithmetic(case: dict[str, Any]) -> dict[str, Any]:
    """Return NeMo-Aligner's baselines, KL penalties and mask."""
    import torch
    from nemo_aligner.utils.ppo_utils import calculate_kl_penalty, calculate_rloo_baseline, create_mask

    rewards_B, ended_B = torch.tensor(case["group_rewards"]), torch.tensor(case["ended"])
    baseline_B = calculate_rloo_baseline(torch.tensor(case["group_prompts"]), rewards_B, ended_B)
    ours_BS, theirs_BS = torch.tensor(case["logprobs"]), torch.tensor(case["reference_logprobs"])
    lengths = torch.tensor(case["prompt_lengths"]), torch.tensor(case["response_lengths"])
    return {
        "baseline": baseline_B.tolist(),
        "kl_abs": calculate_kl_penalty(ours_BS, theirs_BS, use_absolute_kl=True).tolist(),
        "kl": calculate_kl_penalty(ours_BS, theirs_BS, use_absolute_kl=False).tolist(),
        "mask": create_mask(ours_BS, *lengths).tolist(),
    }


def learning_rates(case: dict[str, Any]) -> list[float]:
    """Return the learning rates of NeMo's schedule under the exported settings."""
    import torch
    from nemo.core.optim import lr_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=case["lr"])
    chosen = {name: value for name, value in case["sched"].items() if name != "name"}
    schedule = getattr(lr_scheduler, case["sched"]["name"])(optimizer, max_steps=case["steps"], **chosen)
    rates = []
    for _ in range(case["steps"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return rates


def main(case: dict[str, Any]) -> dict[str, Any]:
    """Return all that the case asks for."""
    import importlib.metadata

    result: dict[str, Any] = {
        "versions": {
            name: importlib.metadata.version(name) for name in ("nemo-aligner", "nemo-toolkit", "megatron-core", "torch", "tritonclient")
        },
        "settings": settings(case) if case["repo"] else None,
    }
    parts = {"data_set": data_set, "arithmetic": arithmetic, "learning_rates": learning_rates, "served": rewards}
    return result | {name: part(case) for name, part in parts.items()}


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
