#!/usr/bin/env bash
# diffusers.DiTPipeline takes any AutoencoderKL and any DiTTransformer2DModel, and reads two facts from neither.
#
# Latents: it decodes z / scaling_factor. A VAE whose config has a shift_factor, or latents_mean and latents_std (as
# today's have; AutoencoderKL stores all three), is decoded as if it had none: the same pixels to the bit with shift 0,
# with shift 0.5 and with means and deviations, without a word. A model trained on latents that were shifted gives
# pictures of a wrong colour and contrast there.
# Classes: the label of "no class" is the literal 1000, not the model's last embedding. Of a model with 10 classes the
# pipeline draws at guidance_scale 1.0; at its default of 4.0 it asks for embedding 1000 of 11, an IndexError.
#
# Seen with diffusers 0.42.1, torch 2.13.0 (CPU) on Python 3.11: as said.
# What helps: give the pipeline latents that are shifted already through a VAE wrapper; for own classes, another
# pipeline, or an embedding of 1,001 rows whose last one is "no class".
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    "torch==2.13.0" "numpy==2.4.6" "diffusers==0.42.1"
cat > "$folder/try.py" <<'PY'
import diffusers
import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

print("diffusers", diffusers.__version__, "torch", torch.__version__)
torch.manual_seed(0)
transformer = DiTTransformer2DModel(
    num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8,
    patch_size=2, num_embeds_ada_norm=10,
).eval()


def draw(guidance_scale, **factors):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, sample_size=16, **factors,
    ).eval()
    assert all(vae.config[name] == value for name, value in factors.items())
    pipe = DiTPipeline(transformer, vae, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe([1], guidance_scale=guidance_scale, num_inference_steps=3, output_type="np",
                generator=torch.Generator().manual_seed(0)).images


plain = draw(1.0)
for factors in ({"shift_factor": 0.5}, {"latents_mean": [0.5] * 4, "latents_std": [2.0] * 4}):
    same = np.array_equal(plain, draw(1.0, **factors))
    print(factors, "pixels are those without:", same)
    assert same
assert not np.array_equal(plain, draw(1.0, scaling_factor=0.5))  # this one is heeded
try:
    draw(4.0)
except IndexError as error:
    print("10 classes, guidance 4.0: IndexError,", error)
else:
    raise SystemExit("10 classes can be drawn with guidance")
PY
"$folder/venv/bin/python" "$folder/try.py"
