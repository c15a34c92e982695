"""diffusers' methods of adapters on random weights, by the alias: as with HF PEFT."""

from pathlib import Path

import pytest
from alias_scripts import OLDER_PEFT, assert_equal, results

pytest.importorskip("diffusers", reason="needs the package diffusers")

MODELS = (
    OLDER_PEFT
    + """
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

targets = ["to_k", "to_q", "to_v", "to_out.0", "conv1"]
torch.manual_seed(5)
sample, context = torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8)


def make_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, sample_size=8, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8, norm_num_groups=2, attention_head_dim=2,
    ).eval()


@torch.no_grad()
def output(unet, **arguments):
    return unet(sample, 3, context, **arguments).sample.flatten()[::17].tolist()


"""
)
UNET = (
    MODELS
    + """
unet = make_unet()
results["base"] = output(unet)
unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights="gaussian"))
unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "second")
fill(unet, "default")
fill(unet, "second")
results["active"] = unet.active_adapters()
results["second"] = output(unet)
unet.set_adapter(["default", "second"])
results["both"] = output(unet)
unet.set_adapters(["default", "second"], [0.5, 2.0])
results["weighted"] = output(unet)
unet.set_adapters(["default"])
results["default"] = output(unet)
results["scaled call"] = output(unet, cross_attention_kwargs={"scale": 0.5})
results["after the call"] = output(unet)
for off, on in ((unet.disable_adapters, unet.enable_adapters), (unet.disable_lora, unet.enable_lora)):
    off()
    results[off.__name__] = output(unet)
    on()
    results[on.__name__] = output(unet)
unet.save_lora_adapter(f"{folder}/lora", adapter_name="default")
unet.fuse_lora()
results["fused"] = output(unet)
unet.unfuse_lora()
results["unfused"] = output(unet)
unet.fuse_lora(lora_scale=0.5, safe_fusing=True, adapter_names=["default"])
results["fused at half scale"] = output(unet)
unet.unfuse_lora()
unet.delete_adapters("second")
results["left"] = sorted(unet.peft_config)
unet.unload_lora()
results["unloaded"] = output(unet)
results["plain keys"] = sorted(unet.state_dict()) == sorted(make_unet().state_dict())
read = dict(prefix=None, use_safetensors=True)
unet.load_lora_adapter(f"{folder}/lora", **read)
results["loaded"] = output(unet)
unet.load_lora_adapter(f"{folder}/lora", adapter_name="b", **read)
results["loaded names"] = [list(unet.peft_config), unet.active_adapters()]
unet = make_unet()
unet.load_lora_adapter(f"{folder}/lora", low_cpu_mem_usage=True, **read)
results["loaded by the meta device"] = output(unet)
unet.fuse_lora()
unet.unload_lora()
results["fused for good"] = output(unet)
unet.load_lora_adapter(f"{folder}/lora", **read)
unet.fuse_lora()
unet.unfuse_lora()
results["loaded again"] = output(unet)
unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
results["base in 8 bits"] = output(unet)

unet = make_unet().requires_grad_(False).train()
unet.add_adapter(LoraConfig(r=4, target_modules=targets))
fill(unet)
optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(4):
    loss = (unet(sample, 3, context).sample - sample).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
results["losses"] = losses
"""
)
PIPELINE = (
    MODELS
    + """
def make_pipeline():
    torch.manual_seed(1)
    vae = AutoencoderKL(
        block_out_channels=[4, 4], norm_num_groups=2, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, sample_size=16,
    )
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=2, projection_dim=8)
    config = CLIPTextConfig(vocab_size=60, max_position_embeddings=16, bos_token_id=0, eos_token_id=2, **sizes)
    return StableDiffusionPipeline(
        unet=make_unet(), vae=vae, text_encoder=CLIPTextModel(config).eval(), tokenizer=None,
        scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )


@torch.no_grad()
def image(pipeline, **arguments):
    pipeline.set_progress_bar_config(disable=True)
    prompt = pipeline.text_encoder(torch.tensor([[0, 5, 7, 2]]))[0]
    images = pipeline(
        prompt_embeds=prompt, negative_prompt_embeds=prompt * 0, num_inference_steps=2, output_type="np",
        generator=torch.Generator().manual_seed(0), **arguments,
    ).images
    return [float(value) for value in images.flatten()[::37]]


pipeline = make_pipeline()
results["base"] = image(pipeline)
pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=targets))
pipeline.text_encoder.add_adapter(LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
fill(pipeline.unet)
fill(pipeline.text_encoder)
results["trained"] = image(pipeline)
parts = {
    "unet_lora_layers": get_peft_model_state_dict(pipeline.unet),
    "text_encoder_lora_layers": get_peft_model_state_dict(pipeline.text_encoder),
}
StableDiffusionPipeline.save_lora_weights(f"{folder}/lora", **parts)
pipeline = make_pipeline()
pipeline.load_lora_weights(f"{folder}/lora", adapter_name="a")
results["loaded"] = image(pipeline)
results["list"] = pipeline.get_list_adapters()
pipeline.set_adapters(["a"], [0.5])
results["half"] = image(pipeline)
pipeline.set_adapters("a")
results["scaled call"] = image(pipeline, cross_attention_kwargs={"scale": 0.3})
pipeline.fuse_lora()
results["fused"] = image(pipeline)
pipeline.unfuse_lora()
pipeline.disable_lora()
results["disabled"] = image(pipeline)
pipeline.enable_lora()
pipeline.load_lora_weights(f"{folder}/lora", adapter_name="b")
pipeline.set_adapters(["a", "b"], [0.5, 0.5])
results["two halves"] = image(pipeline)
pipeline.unet.add_adapter(LoraConfig(r=4, target_modules=targets), "no text")
fill(pipeline.unet, "no text")
pipeline.set_adapters("no text")
results["without the text encoder's"] = image(pipeline)
pipeline.set_adapters(["no text", "a"], [0.5, 0.5])
results["only one has a part for the text encoder"] = image(pipeline)
pipeline.delete_adapters(["b", "no text"])
results["left"] = pipeline.get_list_adapters()
pipeline.unload_lora_weights()
results["unloaded"] = image(pipeline)
pipeline.load_lora_weights(f"{folder}/lora")
results["loaded again"] = image(pipeline)
"""
)


@pytest.mark.slow
def test_a_unet_computes_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(UNET, tmp_path)
    assert_equal(ours, theirs)
    assert ours["default"] != ours["base"] == pytest.approx(ours["unloaded"])


@pytest.mark.slow
def test_a_pipeline_computes_as_with_hf_peft(tmp_path: Path) -> None:
    ours, theirs = results(PIPELINE, tmp_path)
    assert_equal(ours, theirs)
    assert ours["loaded"] != ours["base"] == pytest.approx(ours["unloaded"])
