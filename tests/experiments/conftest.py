from tests.training.conftest import allowed, tiny_config, tiny_params, tiny_prompts

__all__ = ["allowed", "tiny_config", "tiny_params", "tiny_prompts"]  # fixtures
