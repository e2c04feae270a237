"""Tells vLLM of our models, in each of its processes: the entry point of pyproject.toml in vllm.general_plugins.

vLLM loads it where nanovlm is installed in its environment, which has all that our modules need (in the folder of the
repository, with vLLM's pip: `pip install --no-deps -e .`). Nothing else imports it.
"""

# pyright: reportMissingImports=false
from nanovlm.hub.vllm_export import MODEL_TYPE, SEES, TEXT


def register():
    """Name the class of configs, and where the models are; vLLM imports these when it needs them."""
    from transformers import AutoConfig, PretrainedConfig
    from vllm import ModelRegistry

    class NanoVLMConfig(PretrainedConfig):
        model_type = MODEL_TYPE

    AutoConfig.register(MODEL_TYPE, NanoVLMConfig, exist_ok=True)
    for name in (TEXT, SEES):
        ModelRegistry.register_model(name, f"nanovlm.hub.vllm_model:{name}")
