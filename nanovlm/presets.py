"""Recipes: one function a preset, returning a TrainConfig. The command line picks one and overrides fields."""

from nanovlm.config import DataConfig, DecoderConfig, OptimConfig, ParamRule, TrainConfig, VisionConfig, VLMConfig


def scenes() -> TrainConfig:
    """Learn to see from the drawn scenes, in minutes on two CPU cores."""
    return TrainConfig(
        model=VLMConfig(
            vision=VisionConfig(
                image_size=48,
                patch_embedding="conv",
                hidden_size=96,
                intermediate_size=288,
                num_hidden_layers=2,
                num_attention_heads=4,
            ),
            decoder=DecoderConfig(
                hidden_size=96,
                intermediate_size=288,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=24,
                vocab_size=512,
                tie_word_embeddings=False,
            ),
        ),
        data=DataConfig(row_length=192, batch_rows=12, shuffle=False, tokenizer_size=512),
        optim=OptimConfig(
            lr=2e-3,
            steps=1000,
            momentum=0.9,
            rules=(
                ParamRule(r"norm|bias|embed_tokens|position_embedding|lm_head"),
                ParamRule(r"", lr_scale=2.0, weight_decay=1.0, optimizer="muon"),
            ),
        ),
    )


PRESETS = {"scenes": scenes}
