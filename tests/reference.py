"""Numbers of others' networks, for weights and inputs that are formulas: diffusers' AutoencoderKL
(Flux, SD 3), its VQModel with spatial norm (MoVQGAN's decoder), its Kandinsky 5 transformer.

    python tests/reference.py      # writes tests/reference.json anew; needs diffusers
"""
import json
import re
import types
from pathlib import Path

import torch

FILE = Path(__file__).with_name("reference.json")
EVERY = 7  # only each 7th value is kept
WIDTHS = dict(width=32, width_mult=(1, 1, 2, 2), res_blocks=1, padding="zeros")
KL = WIDTHS | dict(latent_channels=16, attention_levels=(), decoder_norm="group")
MOVQ = WIDTHS | dict(latent_channels=4, attention_levels=(3,), decoder_norm="spatial")
K5 = dict(text_encoder="qwen-clip", pooled_width=24, latent_channels=16, width=128, ff_width=256,
          time_width=64, rope_axes=(16, 24, 24), text_width=48, refiner_blocks=2, blocks=3)


def formula_weights(state):
    """The same weights anywhere: sines scaled by fan-in."""
    out = {}
    for i, key in enumerate(sorted(state)):
        w = state[key]
        values = torch.sin(torch.arange(w.numel(), dtype=torch.float64) * 0.7 + i).view(w.shape)
        if w.ndim > 1:
            values = values * (2 / w[0].numel()) ** 0.5
        elif key.endswith("weight"):
            values = 1 + 0.1 * values
        else:
            values = 0.1 * values
        out[key] = values.float()
    return out


def fill(net):
    """Give a network the formula's weights; buffers stay."""
    buffers = dict(net.named_buffers())
    weights = formula_weights({k: v for k, v in net.state_dict().items() if k not in buffers})
    net.load_state_dict(weights, strict=False)
    return net.eval()


def networks():
    """Ours, with the formula's weights: two VAEs and a DiT."""
    from conftest import dit, model
    kl, movq = [fill(model.VAE(model.Architecture(**a))) for a in (KL, MOVQ)]
    return kl, movq, fill(dit.DiT(dit.Network(**K5)))


def formula(*shape):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(n * 0.37 + (n / 64).floor()).view(shape).float()


def flow_inputs():
    """x, t, tokens, mask, pooled for K5."""
    mask = torch.ones(2, 7, dtype=torch.bool)
    return formula(2, 16, 8, 12), torch.tensor([0.3, 0.9]), formula(2, 7, 48), mask, formula(2, 24)


def to_compvis(key):
    """A diffusers name as CompVis writes it; diffusers counts up blocks in the order they run."""
    for theirs, ours in (("resnets", "block"), ("attentions", "attn")):
        key = re.sub(rf"down_blocks\.(\d+)\.{theirs}\.", rf"down.\1.{ours}.", key)
        key = re.sub(rf"up_blocks\.(\d+)\.{theirs}\.",
                     lambda m: f"up.{3 - int(m[1])}.{ours}.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.",
                 lambda m: f"up.{3 - int(m[1])}.upsample.", key)
    key = re.sub(r"mid_block\.resnets\.(\d)\.", lambda m: f"mid.block_{int(m[1]) + 1}.", key)
    key = key.replace("mid_block.attentions.0.", "mid.attn_1.")
    for theirs, ours in (("conv_shortcut", "nin_shortcut"), ("conv_norm_out", "norm_out"),
                         ("group_norm.", "norm."), ("spatial_norm.", "norm."), ("to_q.", "q."),
                         ("to_k.", "k."), ("to_v.", "v."), ("to_out.0.", "proj_out.")):
        key = key.replace(theirs, ours)
    return key


def to_kandinsky(key):
    """One of 07's parameter names as diffusers has it."""
    for ours, theirs in (
            ("time.0", "time_embeddings.in_layer"), ("time.2", "time_embeddings.out_layer"),
            ("text.0", "text_embeddings.in_layer"), ("text.1", "text_embeddings.norm"),
            ("pooled.0", "pooled_text_embeddings.in_layer"),
            ("pooled.1", "pooled_text_embeddings.norm"), ("patches", "visual_embeddings.in_layer"),
            ("refiner", "text_transformer_blocks"), ("blocks", "visual_transformer_blocks"),
            ("out_modulation.1", "out_layer.modulation.out_layer"),
            ("out", "out_layer.out_layer")):
        if key.startswith(ours + "."):
            key = theirs + key[len(ours):]
            break
    key = re.sub(r"^(text|visual)(_transformer.*)\.modulation\.1\.",
                 r"\1\2.\1_modulation.out_layer.", key)
    for ours, theirs in (("q", "to_query"), ("k", "to_key"), ("v", "to_value"),
                         ("out", "out_layer"), ("q_norm", "query_norm"), ("k_norm", "key_norm")):
        key = key.replace(f"attention.{ours}.", f"attention.{theirs}.")
    key = key.replace("feed_forward.0.", "feed_forward.in_layer.")
    return key.replace("feed_forward.2.", "feed_forward.out_layer.")


@torch.no_grad()
def diffusers_outputs():
    """{name: output} of diffusers' three networks with the weights of ours."""
    import diffusers
    import diffusers.models.transformers.transformer_kandinsky as kandinsky
    kl_weights, movq_weights, k5_weights = [dict(net.named_parameters()) for net in networks()]
    common = dict(in_channels=3, out_channels=3, layers_per_block=1,
                  block_out_channels=(32, 32, 64, 64))
    down, up = "DownEncoderBlock2D", "UpDecoderBlock2D"
    kl = diffusers.AutoencoderKL(down_block_types=(down,) * 4, up_block_types=(up,) * 4,
                                 latent_channels=16, use_quant_conv=False,
                                 use_post_quant_conv=False, **common).eval()
    kl.load_state_dict({k: kl_weights[to_compvis(k)].view(v.shape)
                        for k, v in kl.state_dict().items()})
    movq = diffusers.VQModel(
        down_block_types=(down,) * 3 + ("Attn" + down,), up_block_types=("Attn" + up,) + (up,) * 3,
        latent_channels=4, vq_embed_dim=4, num_vq_embeddings=16, norm_type="spatial",
        **common).eval()
    movq.decoder.load_state_dict({k: movq_weights["decoder." + to_compvis(k)].view(v.shape)
                                  for k, v in movq.decoder.state_dict().items()})
    k5 = kandinsky.Kandinsky5Transformer3DModel(
        in_visual_dim=16, out_visual_dim=16, in_text_dim=48, in_text_dim2=24, time_dim=64,
        patch_size=(1, 2, 2), model_dim=128, ff_dim=256, num_text_blocks=2, num_visual_blocks=3,
        axes_dims=(16, 24, 24)).eval()
    # Patches come as (row, column, channel) there, as (channel, row, column) here.
    patches = k5_weights["patches.weight"].unflatten(1, (16, 4)).mT.flatten(1)
    k5_weights["patches.weight"] = patches
    k5.load_state_dict({to_kandinsky(k): v for k, v in k5_weights.items()})
    # It rounds queries and keys to bfloat16 when it rotates them, even in float32: taken out here.
    kandinsky.torch = types.ModuleType("torch")
    kandinsky.torch.__dict__.update(vars(torch) | {"bfloat16": torch.float32})
    x, t, tokens, _, pooled = flow_inputs()
    v = k5(hidden_states=x.permute(0, 2, 3, 1)[:, None], encoder_hidden_states=tokens,
           timestep=1000 * t, pooled_projections=pooled, text_rope_pos=torch.arange(7),
           visual_rope_pos=[torch.arange(1), torch.arange(4), torch.arange(6)]).sample
    z = formula(1, 4, 4, 6)
    return {"kl encoded": kl.encode(formula(1, 3, 32, 48)).latent_dist.mean,
            "kl decoded": kl.decode(formula(1, 16, 4, 6)).sample,
            "movq decoded": movq.decoder(z, z), "velocity": v[:, 0].permute(0, 3, 1, 2)}


def main():
    numbers = {name: [float(f"{v:.7g}") for v in out.flatten()[::EVERY].tolist()]
               for name, out in diffusers_outputs().items()}
    FILE.write_text(json.dumps(numbers))


if __name__ == "__main__":
    main()
