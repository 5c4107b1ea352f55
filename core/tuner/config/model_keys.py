"""Core keys that say which model is trained, what of it, and in which precision."""

from __future__ import annotations

from typing import Literal

from tuner.plugin import PluginConfig, key


class ModelKeys(PluginConfig):
    """Which model, which of its parts, which precision, which attention kernel."""

    model_family: str | None = key(None, "Model family to train: the name of a family plugin, such as `wan`.")
    model_flavour: str | None = key(
        None,
        "Flavour of the family, such as `t2v-480p-1.3b-2.1`; the family's default when absent.",
        aliases=("model_flavor",),
    )
    model_type: Literal["lora", "full"] = key("lora", "Train an adapter (`lora`) or the network itself (`full`).")
    lora_type: Literal["standard", "lycoris"] = key("standard", "Kind of adapter: PEFT LoRA (`standard`) or LyCORIS.")
    pretrained_model_name_or_path: str | None = key(
        None, "Folder or hub repository of the base model in the diffusers layout; the flavour's own when absent."
    )
    pretrained_transformer_model_name_or_path: str | None = key(
        None,
        "Take the denoiser from here instead: a folder, a hub repository or a single `.safetensors` file.",
        aliases=("pretrained_transformer_name_or_path",),
    )
    pretrained_transformer_subfolder: str | None = key(
        "transformer", "Subfolder of the denoiser's weights; `none` when they lie at the top."
    )
    pretrained_vae_model_name_or_path: str | None = key(None, "Take the VAE from here instead (subfolder `vae`).")
    pretrained_t5_model_name_or_path: str | None = key(
        None, "Take tokenizer and text encoder from here instead (subfolders `tokenizer`, `text_encoder`)."
    )
    revision: str | None = key(None, "Revision of the hub repository.")
    mixed_precision: Literal["bf16", "no"] = key("bf16", "Autocast of the training step, and dtype of the frozen base.")
    base_model_precision: str = key(
        "no_change",
        "Quantise the frozen base: `no_change`, or a value of a quantisation plugin, such as `int8-quanto`.",
        effect="memory",
    )
    text_encoder_1_precision: str = key(
        "no_change", "The same for the text encoder, which is only there while captions are encoded.", effect="memory"
    )
    quantize_via: Literal["cpu", "accelerator"] = key(
        "accelerator",
        "Where weights are quantised: on the device, one by one as they are read, or on the CPU.",
    )
    base_model_default_dtype: Literal["bf16", "fp32"] | None = key(
        None, "Dtype of the base's unquantised matrices; follows `mixed_precision` when absent."
    )
    attention_mechanism: str = key(
        "diffusers",
        "Attention kernel: `diffusers` or `auto` is the best exact one; other values come from attention plugins.",
    )
    attention_usage: Literal["training", "inference", "both"] | None = key(
        None, "Where that kernel is used; in both, and one without a backward in inference only, when absent."
    )
    gradient_checkpointing: bool | Literal["selective", "offload"] = key(
        True,
        "What is kept of a block for backward. `true`: its input, the rest is computed again; `selective`: also the "
        "output of self-attention, so that it is computed once; `offload`: its input, in host memory; `false`: all.",
    )
    gradient_checkpointing_interval: int = key(
        1,
        "Checkpoint every so many-th block, and keep all of the others.",
        ge=1,
    )

    @property
    def checkpointing(self) -> Literal["none", "full", "selective", "offload"]:
        """The value of ``gradient_checkpointing`` by name."""
        chosen = self.gradient_checkpointing
        return ("full" if chosen else "none") if isinstance(chosen, bool) else chosen
