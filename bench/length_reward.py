"""The reward of bench/compare.py, for all trainers: the share of even words, so that responses to a problem differ."""


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: dict) -> float:
    words = solution_str.split()
    return sum(word[-1] in "02468" for word in words) / max(1, len(words))


def trl_reward(completions: list[str], **columns: list) -> list[float]:
    """The same, as TRL asks for it: a batch at once."""
    return [compute_score("", text, "", {}) for text in completions]


def reward_func(queries: list[str], prompts: list[str], labels: list[str]) -> dict:
    """The same, as OpenRLHF asks for it: prompt and response are one text, in which an ended response shows its last token."""
    import torch

    texts = (query.removeprefix(prompt).removesuffix("<eos>") for query, prompt in zip(queries, prompts, strict=True))
    scores = torch.tensor([compute_score("", text, "", {}) for text in texts])
    return {"rewards": scores, "scores": scores}
