"""SemAIM*: order and target features from CLIP's ViT-B/16, projected to 512 channels. Published: 85.3 top-1."""

_base_ = "../_base_/pretrain.py"

model = dict(
    network=dict(
        guide=dict(
            _delete_=True,
            type="Teacher",
            name="vit_base_patch16_clip_quickgelu_224.openai",  # OpenAI's weights were trained with QuickGELU
            project=True,
            # The official code feeds CLIP the student's images, with ImageNet's mean and std. "teacher" would give it
            # those it was trained with: better posed, and not what was published.
            normalisation="student",
        ),
        target=dict(_delete_=True, type="FeatureTarget"),
    )
)
