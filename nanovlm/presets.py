"""Recipes: each preset is a function that returns a TrainConfig. The command line picks one and overrides fields."""

import dataclasses

from nanovlm.config import (
    AdapterConfig,
    DataConfig,
    DecoderConfig,
    DualConfig,
    EvalConfig,
    InitConfig,
    MoEConfig,
    OptimConfig,
    ParallelConfig,
    ParamRule,
    ProjectorConfig,
    TextConfig,
    TilingConfig,
    TrainConfig,
    VisionConfig,
    VLMConfig,
)


def scenes() -> TrainConfig:
    """Learn to see from the drawn scenes, in minutes on two CPU cores."""
    return TrainConfig(
        model=VLMConfig(
            vision=VisionConfig(
                image_size=48,
                patch_size=16,
                hidden_size=192,
                intermediate_size=768,
                num_hidden_layers=1,
                num_attention_heads=4,
            ),
            projector=ProjectorConfig(scale_factor=1),
            tiling=TilingConfig(policy="idefics3", longest_edge=48),
            decoder=DecoderConfig(
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=32,
                vocab_size=512,
                tie_word_embeddings=False,
            ),
        ),
        # Lessons: what an image shows and where, then finding one object by name, then two, then all (docs/log.md).
        data=DataConfig(
            sources=(
                "scenes:cells,digits",
                "scenes:color,shape,position,digits",
                "scenes:shape,position,relation,digits",
                "scenes",
            ),
            lessons=(5_000, 6_500, 5_000),
            row_length=176,
            batch_rows=13,
            tokenizer_size=512,
        ),
        optim=OptimConfig(
            lr=4e-3,
            steps=950,
            schedule="wsd",
            decay_start=0.45,
            momentum=0.9,
            rules=(
                ParamRule(r"norm|bias|embed_tokens|position_embedding|lm_head"),
                ParamRule(r"", lr_scale=2.0, weight_decay=1.0, optimizer="muon"),
            ),
        ),
        eval=EvalConfig(tasks=("scenes", "scenes:compositional")),
    )


def scenes_moe() -> TrainConfig:
    """Scenes with a mixture of 8 experts, 2 for each token: as many active parameters."""
    base = scenes()
    moe = MoEConfig(num_experts=8, num_experts_per_tok=2, intermediate_size=base.model.decoder.intermediate_size // 2)
    decoder = dataclasses.replace(base.model.decoder, moe=moe)
    model = dataclasses.replace(base.model, decoder=decoder)
    optim = dataclasses.replace(base.optim, rules=(ParamRule("router"), *base.optim.rules))
    return dataclasses.replace(base, run_dir="runs/scenes_moe", model=model, optim=optim)


def scenes_siglip() -> TrainConfig:
    """Learn by contrast which caption is a scene's: an image encoder for scenes, and a text encoder."""
    base = scenes()
    assert base.model.vision is not None
    return TrainConfig(
        run_dir="runs/scenes_siglip",
        dual=DualConfig(
            vision=base.model.vision,
            text=TextConfig(
                vocab_size=512,
                hidden_size=96,
                intermediate_size=384,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=32,
                is_padded=True,
            ),
            projection_size=192,
            initial_bias=-5.0,
        ),
        # 256 pairs a step. Few of the captions are equal: 2,250 of one object, far more of two and three.
        data=DataConfig(sources=("scenes:caption",), row_length=512, batch_rows=16, tokenizer_size=512),
        optim=OptimConfig(
            lr=4e-3,
            steps=400,
            schedule="wsd",
            decay_start=0.45,
            momentum=0.9,
            rules=(
                ParamRule(r"norm|bias|(token|position)_embedding|logit|probe"),
                ParamRule(r"", lr_scale=2.0, weight_decay=1.0, optimizer="muon"),
            ),
        ),
        eval=EvalConfig(show_every=0),
        objective="contrastive",
    )


def small() -> TrainConfig:
    """Learn from your own records, named by --data.sources, from random weights: 9 M parameters."""
    vocab_size = 4096
    return TrainConfig(
        run_dir="runs/small",
        model=VLMConfig(
            vision=VisionConfig(
                image_size=256, patch_size=16, hidden_size=256, intermediate_size=1024, num_hidden_layers=4
            ),
            projector=ProjectorConfig(scale_factor=2),
            decoder=DecoderConfig(
                vocab_size=vocab_size,
                hidden_size=256,
                intermediate_size=768,
                num_hidden_layers=6,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=64,
            ),
        ),
        data=DataConfig(
            sources=(), row_length=1024, too_long="shrink", batch_rows=2, val_fraction=0.05, tokenizer_size=vocab_size
        ),
        optim=OptimConfig(
            steps=1000,
            warmup_steps=50,
            rules=(ParamRule(r"norm|bias|embed_tokens|position_embedding"), ParamRule(r"", weight_decay=0.1)),
        ),
        eval=EvalConfig(every=100),
    )


# The usual recipe, in three commands: train the projector between two frozen backbones, then with the decoder, then
# everything. Shapes are those of SmolVLM-256M: SigLIP-B/16-512 and SmolLM2-135M, whose head stays tied here (228 M).

SMOLVLM_256M = VLMConfig(
    vision=VisionConfig(
        image_size=512,
        patch_size=16,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
    ),
    projector=ProjectorConfig(scale_factor=4),
    tiling=TilingConfig(policy="idefics3", longest_edge=2048),
    decoder=DecoderConfig(
        vocab_size=49280,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        rope_theta=100000.0,
    ),
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
    image_token_id=49152,
)


def smolvlm_256m_stage1() -> TrainConfig:
    """Train the projector between SigLIP and SmolLM2 from the hub, both frozen."""
    return TrainConfig(
        run_dir="runs/smolvlm_256m_stage1",
        model=SMOLVLM_256M,
        init=InitConfig(vision="google/siglip-base-patch16-512", decoder="HuggingFaceTB/SmolLM2-135M-Instruct"),
        data=DataConfig(
            sources=("hub:HuggingFaceM4/the_cauldron:localized_narratives",),
            row_length=4096,
            batch_rows=4,
            max_tiles=32,
            chat_template="chatml",
        ),
        optim=OptimConfig(lr=1e-3, steps=2000, micro_batches=4, rules=(FROZEN_BACKBONES, PROJECTOR)),
    )


def smolvlm_256m_stage2() -> TrainConfig:
    """Go on from stage 1: train the projector and the decoder, with the encoder still frozen."""
    first = smolvlm_256m_stage1()
    return dataclasses.replace(
        first,
        run_dir="runs/smolvlm_256m_stage2",
        init=InitConfig(model="runs/smolvlm_256m_stage1/model"),
        data=dataclasses.replace(first.data, sources=("hub:HuggingFaceM4/the_cauldron:vqav2",)),
        optim=dataclasses.replace(first.optim, lr=1e-4, steps=10000, rules=(FROZEN_ENCODER, PROJECTOR, NORMS, REST)),
    )


def smolvlm_256m_stage3() -> TrainConfig:
    """Go on from stage 2: train everything, the encoder at a tenth of the learning rate."""
    second = smolvlm_256m_stage2()
    return dataclasses.replace(
        second,
        run_dir="runs/smolvlm_256m_stage3",
        init=InitConfig(model="runs/smolvlm_256m_stage2/model"),
        optim=dataclasses.replace(
            second.optim, lr=5e-5, rules=(ParamRule(r"^vision\.", lr_scale=0.1), PROJECTOR, NORMS, REST)
        ),
    )


# Adapters of a published model, whose own config the run takes (train/init.py: take_model).


def smolvlm_sft() -> TrainConfig:
    """Teach SmolVLM questions about scanned pages: DoRA on weights of 4 bits, one pass."""
    return TrainConfig(
        run_dir="runs/smolvlm_sft",
        init=InitConfig(model="HuggingFaceTB/SmolVLM-256M-Instruct"),
        adapter=AdapterConfig(rank=8, alpha=8.0, dropout=0.1, use_dora=True, init="gaussian", base="nf4"),
        # A row has one page, of 17 tiles and about 1,130 tokens: as many pages a step as the recipe's 4 x 4 samples.
        data=DataConfig(
            sources=("hub:HuggingFaceM4/DocumentVQA",),
            row_length=1280,
            too_long="shrink",
            batch_rows=4,
            num_epochs=1,
            val_fraction=0.01,
        ),
        optim=OptimConfig(lr=1e-4, steps=2440, warmup_steps=50, micro_batches=4, rules=(REST,)),
        eval=EvalConfig(limit=100, every=500),
    )


def captions_qlora() -> TrainConfig:
    """Teach SmolVLM captions of radiographs: LoRA on weights of 4 bits, blocks recomputed."""
    return TrainConfig(
        run_dir="runs/captions_qlora",
        init=InitConfig(model="HuggingFaceTB/SmolVLM-256M-Instruct"),
        adapter=AdapterConfig(rank=16, alpha=16.0, dropout=0.05, base="nf4"),
        data=DataConfig(
            sources=("hub:unsloth/Radiology_mini",),  # 1,978 pictures
            row_length=1280,
            too_long="shrink",
            batch_rows=2,
            val_fraction=0.05,
        ),
        optim=OptimConfig(lr=2e-4, steps=180, warmup_steps=18, max_grad_norm=0.3, micro_batches=16, rules=(REST,)),
        eval=EvalConfig(limit=100, every=60),
        parallel=ParallelConfig(checkpointing="full"),
        precision="bf16",
    )


FROZEN_BACKBONES = ParamRule(r"^(vision|decoder)\.", lr_scale=None)
FROZEN_ENCODER = ParamRule(r"^vision\.", lr_scale=None)
PROJECTOR = ParamRule(r"^projector\.")
NORMS = ParamRule(r"norm|bias|embed_tokens")
REST = ParamRule(r"", weight_decay=0.01)

PRESETS = {
    function.__name__: function
    for function in (
        scenes,
        scenes_moe,
        scenes_siglip,
        small,
        smolvlm_256m_stage1,
        smolvlm_256m_stage2,
        smolvlm_256m_stage3,
        smolvlm_sft,
        captions_qlora,
    )
}
