"""Small networks of transformers for tests: the model, a batch, the first layer's name."""

import torch
from torch import nn


def resnet() -> tuple[nn.Module, torch.Tensor, str]:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    name = "resnet.embedder.embedder.convolution"
    return ResNetForImageClassification(config), torch.rand(2, 3, 32, 32), name


def wav2vec2() -> tuple[nn.Module, torch.Tensor, str]:
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
        conv_dim=(5, 4), conv_stride=(5, 2), conv_kernel=(21, 3), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, vocab_size=8,
    )  # fmt: skip
    name = "wav2vec2.feature_extractor.conv_layers.0.conv"
    return Wav2Vec2ForSequenceClassification(config), torch.randn(4, 600), name


def videomae() -> tuple[nn.Module, torch.Tensor, str]:
    from transformers import VideoMAEConfig, VideoMAEForVideoClassification

    config = VideoMAEConfig(
        image_size=14, patch_size=7, num_frames=5, tubelet_size=5, hidden_size=4,
        num_hidden_layers=1, num_attention_heads=2, intermediate_size=8,
    )  # fmt: skip
    name = "videomae.embeddings.patch_embeddings.projection"
    return VideoMAEForVideoClassification(config), torch.rand(2, 5, 3, 14, 14), name
