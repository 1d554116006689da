"""Encode a data set once."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from d_emo.data import ClassImages
from d_emo.errors import InputError, RunError
from d_emo.latents.codec import Codec, latent_side
from d_emo.latents.shards import Origin, is_finished, shard_path, write_index, write_shard


def encode(
    images: ClassImages, codec: Codec, folder: str | Path, *, device: torch.device, dtype: str = "float16",
    batch_size: int = 64, shard_size: int = 4096, num_workers: int = 0, rank: int = 0, world_size: int = 1,
) -> bool:
    """Write the posterior moments of every image, and of its mirror image where that keeps its class, into shards.

    Shard k is made by process k % ``world_size``; the processes need not know of each other. Shards that are there
    and match their checksum are kept, a damaged one is named and made anew, so the same call resumes after a stop.

    Args:
        images: The data set; read in its own order.
        codec: Gives the moments; already on ``device``.
        folder: Where shards and index go.
        dtype: float16, bfloat16 or float32, of the stored moments.
        batch_size: Images encoded at once; a batch never reaches over the end of a shard.
        shard_size: Images per shard.
        num_workers: Processes that read images.

    Returns:
        Whether this call completed the folder; with nothing left to do, True for rank 0.

    Raises:
        InputError: ``folder`` cannot be made or holds latents of something else; an image that cannot be read, or of a
            size that the codec's steps do not divide.
        RunError: A moment is not finite, the image is named; or the disk is full. Finished shards stay.
    """
    latent_side(codec, images.image_size)
    folder, origin = Path(folder), Origin.of(images, codec, dtype=dtype, shard_size=shard_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {folder}: {error.strerror}") from None
    mine = range(rank, origin.num_shards, world_size)
    pending = [shard for shard in mine if not is_finished(shard_path(folder, shard), origin)]
    total, todo = (sum(len(origin.rows(shard)) for shard in shards) for shards in (mine, pending))
    bar = tqdm(total=total, initial=total - todo, desc="encoding", unit="image", disable=rank != 0 or not todo)
    batches = [rows[at : at + batch_size] for rows in map(origin.rows, pending)
               for at in range(0, len(rows), batch_size)]
    loader = iter(DataLoader(images, batch_sampler=batches, num_workers=num_workers, pin_memory=device.type == "cuda"))
    with bar:
        for shard in pending:
            moments, labels = _encode_rows(images, codec, origin, origin.rows(shard), loader, device, bar)
            write_shard(shard_path(folder, shard), moments, labels, origin)
    written = write_index(folder, origin, images.class_names)
    return written is not None and (written or rank == 0 or bool(pending))


def _encode_rows(
    images: ClassImages, codec: Codec, origin: Origin, rows: range, loader: Iterator, device: torch.device, bar: tqdm
) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments and labels of one shard. Shape: (n, C', h, w) in the dtype of the folder, (n,)."""
    parts, labels, done = [], [], rows.start
    while done < rows.stop:
        batch, label = next(loader)
        batch = batch.to(device, non_blocking=True)
        moments = [codec.moments(batch)] + ([codec.moments(batch.flip(-1))] if origin.mirrored else [])
        moments = torch.cat(moments, dim=1).to(getattr(torch, origin.dtype)).cpu()
        finite = moments.flatten(1).isfinite().all(dim=1)
        if not finite.all():
            name = images.origin(done + int((~finite).nonzero()[0]))
            raise RunError(
                f"the latents of {name} are not finite in {origin.dtype}; the finished shards stay. Look at the image, "
                "or try `dtype` float32 with another `output`"
            )
        parts.append(moments)
        labels.append(label)
        done += len(label)
        bar.update(len(label))
    return torch.cat(parts), torch.cat(labels)
