"""A slow, plain reference of the networks in float64, written from the equations and from the released names.

One image at a time, channels first, one loop per window and head, the softmax spelled out. It shares no code with
``d_emo.models``: the two agree or one of them is wrong.
"""

import math

import torch
import torch.nn.functional as F

EPS = 1e-6


def windows_of(mode, height, width, window):
    """The row and column indices of every window of a map that the window divides."""
    (h, w), found = window, []
    for n in range(height // h):
        for m in range(width // w):
            if mode == "near":
                found.append((range(n * h, n * h + h), range(m * w, m * w + w)))
            else:
                found.append((range(n, height, height // h), range(m, width, width // w)))
    return found


def attend(q, k, v, heads, window, modes):
    """q, k (C, H, W), v (M, H, W): attention in the windows of each mode, summed over the modes."""
    out = torch.zeros_like(v)
    d, e = q.shape[0] // heads, v.shape[0] // heads
    for mode in modes:
        for rows, columns in windows_of(mode, *q.shape[1:], window):
            tokens = [(i, j) for i in rows for j in columns]
            i, j = torch.tensor([t[0] for t in tokens]), torch.tensor([t[1] for t in tokens])
            for head in range(heads):
                qs, ks = (x[head * d : (head + 1) * d, i, j] for x in (q, k))  # (d, T)
                logits = qs.T @ ks / math.sqrt(d)  # (T, T)
                weights = torch.exp(logits - logits.max(dim=1, keepdim=True).values)
                weights = weights / weights.sum(dim=1, keepdim=True)
                out[head * e : (head + 1) * e, i, j] += v[head * e : (head + 1) * e, i, j] @ weights.T
    return out


def pointwise(x, weight, bias=None):
    y = torch.einsum("oc,chw->ohw", weight.reshape(weight.shape[0], -1), x)
    return y if bias is None else y + bias[:, None, None]


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def batch_norm(x, p, name):
    column = {k: p[f"{name}.{k}"][:, None, None] for k in ("weight", "bias", "running_mean", "running_var")}
    scaled = (x - column["running_mean"]) / torch.sqrt(column["running_var"] + EPS)
    return scaled * column["weight"] + column["bias"]


def layer_norm(x, weight=None, bias=None):
    """Over the channels, axis 0."""
    y = (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + EPS)
    return y if weight is None else y * weight[:, None, None] + bias[:, None, None]


def depthwise(x, weight, stride=1):
    """One shifted copy of the map per tap of the kernel."""
    size, (height, width) = weight.shape[-1], x.shape[1:]
    padded = F.pad(x, [size // 2] * 4)
    taps = [
        weight[:, 0, i, j, None, None] * padded[:, i : i + height, j : j + width]
        for i in range(size)
        for j in range(size)
    ]
    return sum(taps)[:, ::stride, ::stride]


def operator(u, p, *, names, act, heads=None, window=None, modes=(), pre=False, stride=1, skip=True, conv=True):
    """F of the Meta Mobile Block; ``names`` maps the roles qk, v, local, norm, proj to prefixes in ``p``."""
    if modes:
        height, width = u.shape[1:]
        u = F.pad(u, (0, -width % window[1], 0, -height % window[0]))
        qk = pointwise(u, p[names["qk"] + ".weight"], p[names["qk"] + ".bias"])
        q, k = qk[: u.shape[0]], qk[u.shape[0] :]
        if pre:
            mixed = attend(q, k, u, heads, window, modes)
            a = act(pointwise(mixed, p[names["v"] + ".weight"], p[names["v"] + ".bias"]))
        else:
            v = act(pointwise(u, p[names["v"] + ".weight"], p[names["v"] + ".bias"]))
            a = attend(q, k, v, heads, window, modes)
        a = a[:, :height, :width]
    else:
        a = act(pointwise(u, p[names["v"] + ".weight"], p[names["v"] + ".bias"]))
    if conv:
        y = depthwise(a, p[names["local"] + ".weight"], stride)
        y = silu(batch_norm(y, p, names["norm"]) if names["norm"] else y)
        a = a + y if skip else y
    return pointwise(a, p[names["proj"] + ".weight"])


def emo(x, p, *, version, depths, head_dims, window):
    """An EMOv1 or EMOv2 classifier in eval mode, from the released names: image (3, H, W) -> logits (classes,)."""
    conv = "stage0.0.convs.0.0" if version == 1 else "stage0.0.conv"
    x = F.conv2d(x[None], p[conv + ".weight"], p[conv + ".bias"], stride=2, padding=1)[0]
    if version == 1:
        x = batch_norm(x, p, "stage0.0.convs.0.1")
        x = silu(batch_norm(depthwise(x, p["stage0.1.conv_local.conv.weight"]), p, "stage0.1.conv_local.norm"))
        mean = x.mean(dim=(1, 2))[:, None, None]
        gate = silu(pointwise(mean, p["stage0.1.se.conv_reduce.weight"], p["stage0.1.se.conv_reduce.bias"]))
        gate = pointwise(gate, p["stage0.1.se.conv_expand.weight"], p["stage0.1.se.conv_expand.bias"])
        x = pointwise(x / (1 + torch.exp(-gate)), p["stage0.1.proj.conv.weight"])
    else:
        x = silu(batch_norm(x, p, "stage0.0.norm"))
        x = silu(batch_norm(depthwise(x, p["stage0.1.conv.weight"]), p, "stage0.1.norm"))
        x = pointwise(x, p["stage0.2.conv.weight"])
    for stage, depth in enumerate(depths, 1):
        for i in range(depth):
            x = emo_block(x, p, f"stage{stage}.{i}", version, stage, i == 0, head_dims[stage - 1], window)
    x = layer_norm(x, p["norm.norm.weight"], p["norm.norm.bias"]).mean(dim=(1, 2))
    return p["head.weight"] @ x + p["head.bias"]


def emo_block(x, p, name, version, stage, first, head_dim, window):
    if stage <= 2:
        u, act = batch_norm(x, p, name + ".norm"), silu
    else:
        u, act = layer_norm(x, p[name + ".norm.norm.weight"], p[name + ".norm.norm.bias"]), gelu
    attention = stage >= 3 and not first
    inner = name if version == 1 else name + ".eops.0"
    names = {
        "qk": inner + ".qk.conv",
        "v": inner + (".v.conv" if version == 1 or attention else ".net.conv"),
        "local": name + ".conv_local.conv",
        "norm": name + ".conv_local.norm",
        "proj": name + ".proj.conv",
    }
    modes = () if not attention else ("far",) if version == 1 else ("near", "far")
    y = operator(
        u, p, names=names, act=act, heads=x.shape[0] // head_dim, window=window, modes=modes, pre=version == 1,
        stride=2 if first else 1, skip=not first,
    )  # fmt: skip
    if version == 2:
        y = y * p[name + ".ls.gamma"].reshape(-1, 1, 1)
    return y if first else x + y


def sinusoid(t, features=256):
    half = features // 2
    angles = torch.tensor([t * 10000 ** (-i / half) for i in range(half)], dtype=torch.float64)
    return torch.cat([torch.cos(angles), torch.sin(angles)])


def position(channels, height, width):
    """(channels, H, W): sines and cosines of the column, then of the row."""
    quarter = channels // 4
    out = torch.zeros(channels, height, width, dtype=torch.float64)
    for i in range(quarter):
        frequency = 10000 ** (-i / quarter)
        for row in range(height):
            for column in range(width):
                out[i, row, column] = math.sin(column * frequency)
                out[quarter + i, row, column] = math.cos(column * frequency)
                out[2 * quarter + i, row, column] = math.sin(row * frequency)
                out[3 * quarter + i, row, column] = math.cos(row * frequency)
    return out


def condition(t, y, p):
    """SiLU of the sum of timestep and label embedding."""
    hidden = silu(p["t_embedder.mlp.0.weight"] @ sinusoid(t) + p["t_embedder.mlp.0.bias"])
    embedded = p["t_embedder.mlp.2.weight"] @ hidden + p["t_embedder.mlp.2.bias"]
    return silu(embedded + p["y_embedder.embedding_table.weight"][y])


def adaln(c, p, name, chunks):
    projected = p[name + ".adaLN_modulation.1.weight"] @ c + p[name + ".adaLN_modulation.1.bias"]
    return [chunk[:, None, None] for chunk in projected.chunk(chunks)]


def unpatchify(x, patch, out_channels):
    """(p * p * C_out, H, W) -> (C_out, H * p, W * p)."""
    _, height, width = x.shape
    out = torch.zeros(out_channels, height * patch, width * patch, dtype=x.dtype)
    for i in range(patch):
        for j in range(patch):
            for channel in range(out_channels):
                out[channel, i::patch, j::patch] = x[(i * patch + j) * out_channels + channel]
    return out


def embed(latent, p, patch):
    x = F.conv2d(latent[None], p["x_embedder.proj.weight"], p["x_embedder.proj.bias"], stride=patch)[0]
    return x + position(*x.shape)


def dit(latent, t, y, p, *, depth, heads, patch, out_channels):
    """DiT from its released names: latent (4, H, W) -> (out_channels, H, W)."""
    x, c = embed(latent, p, patch), condition(t, y, p)
    for i in range(depth):
        name = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln(c, p, name, 6)
        u = layer_norm(x) * (1 + scale1) + shift1
        q, k, v = pointwise(u, p[name + ".attn.qkv.weight"], p[name + ".attn.qkv.bias"]).chunk(3)
        mixed = attend(q, k, v, heads, x.shape[1:], ("near",))
        x = x + gate1 * pointwise(mixed, p[name + ".attn.proj.weight"], p[name + ".attn.proj.bias"])
        u = layer_norm(x) * (1 + scale2) + shift2
        hidden = pointwise(u, p[name + ".mlp.fc1.weight"], p[name + ".mlp.fc1.bias"])
        hidden = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + gate2 * pointwise(hidden, p[name + ".mlp.fc2.weight"], p[name + ".mlp.fc2.bias"])
    shift, scale = adaln(c, p, "final_layer", 2)
    x = layer_norm(x) * (1 + scale) + shift
    x = pointwise(x, p["final_layer.linear.weight"], p["final_layer.linear.bias"])
    return unpatchify(x, patch, out_channels)


def demo_block(x, c, p, name, *, heads, window, modes):
    """The conditioned i2RMB: (C, H, W) -> (C, H, W)."""
    inner = name + ".operator."
    names = {
        "qk": inner + "expand.qk",
        "v": inner + "expand.v",
        "local": inner + "local.conv",
        "norm": inner + "local.norm.bn",
        "proj": inner + "proj",
    }
    shift, scale, gate = adaln(c, p, name, 3)
    u = layer_norm(x, p[name + ".norm.weight"], p[name + ".norm.bias"]) * (1 + scale) + shift
    return x + gate * operator(u, p, names=names, act=gelu, heads=heads, window=window, modes=modes)


def demo_head(x, c, p, patch, out_channels):
    """The final layer: (C, H, W) -> (out_channels, H * p, W * p)."""
    shift, scale = adaln(c, p, "final_layer", 2)
    x = layer_norm(x, p["final_layer.norm.weight"], p["final_layer.norm.bias"]) * (1 + scale) + shift
    x = pointwise(x, p["final_layer.linear.weight"], p["final_layer.linear.bias"])
    return unpatchify(x, patch, out_channels)


def demo(latent, t, y, p, *, depth, heads, patch, out_channels, window, modes=("near", "far")):
    """D-EMO from our own names: latent (C_in, H, W) -> (out_channels, H, W)."""
    x, c = embed(latent, p, patch), condition(t, y, p)
    for i in range(depth):
        x = demo_block(x, c, p, f"blocks.{i}", heads=heads, window=window, modes=modes)
    return demo_head(x, c, p, patch, out_channels)


def hierarchical(latent, t, y, p, *, widths, depths, head_size, patch, out_channels, window):
    """The U of D-EMO's blocks from our own names: latent (C_in, H, W) -> (out_channels, H, W)."""
    x, c, skips = embed(latent, p, patch), condition(t, y, p), []

    def blocks(x, name, level):
        clamped = tuple(min(window, size) for size in x.shape[1:])
        heads = widths[level] // head_size
        for i in range(depths[level]):
            x = demo_block(x, c, p, f"{name}.{i}", heads=heads, window=clamped, modes=("near", "far"))
        return x

    last = len(widths) - 1
    for level in range(last):
        x = blocks(x, f"down_blocks.{level}", level)
        skips.append(x)
        neighbours = [x[:, i::2, j::2] for i in range(2) for j in range(2)]
        name = f"downsamplers.{level}.proj"
        x = pointwise(torch.cat(neighbours), p[name + ".weight"], p[name + ".bias"])
    x = blocks(x, "mid_blocks", last)
    for step, level in enumerate(reversed(range(last))):
        name = f"upsamplers.{step}"
        x = pointwise(x, p[name + ".proj.weight"], p[name + ".proj.bias"])
        x = torch.cat([unpatchify(x, 2, widths[level]), skips[level]])
        x = pointwise(x, p[name + ".fuse.weight"], p[name + ".fuse.bias"])
        x = blocks(x, f"up_blocks.{step}", level)
    return demo_head(x, c, p, patch, out_channels)


def random_weights(shapes, seed=0):
    """Values for every name: fan-in scaled matrices, variances away from zero, counters as integers."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes.items():
        values = torch.randn(tuple(shape), generator=generator)
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            weights[name] = values.abs() + 0.5
        elif len(shape) >= 2 and not name.endswith("gamma"):
            weights[name] = values / math.sqrt(max(1, math.prod(shape[1:])))
        else:
            weights[name] = values * 0.5
    return weights


def randomize(module, seed=0):
    """Give every parameter and statistic of ``module`` a random value; float64, eval mode.

    A denoiser's position embedding is made anew in float64, since its own is rounded to float32.
    """
    state = module.double().state_dict()
    fresh = random_weights({k: v.shape for k, v in state.items()}, seed)
    if "pos_embed" in state:
        fresh["pos_embed"] = position(state["pos_embed"].shape[-1], *module.grid).flatten(1).T[None]
    module.load_state_dict(fresh)
    return module.eval()
