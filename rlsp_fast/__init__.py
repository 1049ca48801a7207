"""High-throughput trainer for RLSP: PPO with vLLM generation and training on the same devices."""

__version__ = "0.1.0"
