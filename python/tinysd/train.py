"""Train the embedded base model, stage by stage; every stage resumes from its last checkpoint.

    python -m tinysd.train render    pictures, captions and label maps (encode renders what is missing)
    python -m tinysd.train vae       autoencoder
    python -m tinysd.train clip      contrastive text and vision towers
    python -m tinysd.train encode    latents; may run beside the next stage
    python -m tinysd.train adopt     the weights that ship as the last checkpoint, to go on from
    python -m tinysd.train unet      denoiser and its text encoder
    python -m tinysd.train detector  segmentation detector for the metrics
    python -m tinysd.train export    the folders that ship
    python -m tinysd.train metrics   metrics.json and contact_sheet.png of what ships
    python -m tinysd.train sheet     one sheet of samples from the last checkpoint

Stages that train take --finish-at HH:MM (UTC), when the learning rate reaches zero.  Everything is kept in
$TINYSD_CACHE (~/.cache/tinysd).
"""

from __future__ import annotations

import argparse

from . import data

STAGES = ("render", "vae", "clip", "encode", "adopt", "unet", "detector", "export", "metrics", "sheet")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tinysd.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--chunks", type=int, default=20, help=f"chunks of {data.CHUNK} pictures (default 20)"
    )
    parser.add_argument("--first-chunk", type=int, default=0, help="of those that encode does (default 0)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of the denoiser (default 1e-3)")
    parser.add_argument(
        "--finish-at", default="23:59", metavar="HH:MM", help="when training ends, UTC (default 23:59)"
    )
    args = parser.parse_args()
    if args.stage == "render":
        data.render_all(range(args.chunks))
    elif args.stage == "vae":
        from . import vae

        vae.train(args.finish_at, args.chunks)
    elif args.stage == "clip":
        from . import clip

        clip.train(args.finish_at, args.chunks)
    elif args.stage == "encode":
        from . import unet

        unet.encode(range(args.first_chunk, args.chunks))
    elif args.stage == "adopt":
        from . import unet

        unet.adopt()
    elif args.stage == "unet":
        from . import unet

        unet.train(args.finish_at, rate=args.rate)
    elif args.stage == "detector":
        from . import detector_training

        detector_training.train(args.finish_at, args.chunks)
    elif args.stage == "sheet":
        from . import unet

        unet.sheet(unet.sample(unet.pipeline(), list(unet.PROMPTS))).save(data.CACHE / "sheet.png")
    else:
        from . import export

        getattr(export, args.stage)()


if __name__ == "__main__":
    main()
