"""``customdiff sample``: draw pictures."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import add_base, add_drawing, check_pictures, guidance_scale, is_sheet, save_pictures
from .scenes import add_scenes, check_guided, layout_guidance, read_scenes, share, subject_maps

SUMMARY = "Draw pictures, with concepts, residuals and layouts, or without."
EXAMPLES = """--concept, --residual, --box and --layout serve the --prompt before them. A --concept that
stands before all prompts serves each that names its modifier token or, if it has none, each that no other
concept serves; a --residual or --box there serves each that names its subject, a --layout all. What serves no
prompt is an error. All pictures are sampled in one batch.

examples:
  customdiff sample --concept dog.safetensors --prompt "photo of a <new1> dog" --prompt "a cat"
  customdiff sample --prompt "a <new1> dog" --concept dog.safetensors --prompt "a cup" --count 2
  customdiff sample --concept dog.safetensors --prompt "a <new1> dog in the snow" --output snow/
  customdiff sample --prompt "a dog and a mug" --residual dog.safetensors --residual mug=mug.pt \\
      --box dog=0.05,0.4,0.45,0.95 --box mug=0.55,0.5,0.85,0.9 --draw-layout --save-attention
  customdiff sample --layout guidance_config_example.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_scenes(parser)
    parser.add_argument(
        "--output", default="sample.png", help="a .png for one sheet of all pictures, else a folder"
    )
    add_drawing(parser)
    parser.add_argument("--eta", type=float, default=0.0, help="0: DDIM; 1: the noise of DDPM (default: 0)")
    parser.add_argument(
        "--guidance-rescale",
        type=float,
        default=0.0,
        metavar="PART",
        help="0 to 1: how much of the oversaturation by a large --guidance is taken back (default: 0)",
    )
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to guide away from")
    add_base(parser)


def run(options: argparse.Namespace) -> None:
    from ..attention import Recorder, steered
    from ..base import load_base
    from ..layout_pictures import drawn
    from ..plotting import draw_maps, new_figure, save_figure
    from ..sampler import latent_size, sample

    output = Path(options.output)
    check_pictures(output)
    wanted, shared = read_scenes(options)
    guidance = layout_guidance(options, wanted)
    maps_file = output.with_suffix(".attention.png") if is_sheet(output) else output / "attention.png"
    figure = new_figure(maps_file) if options.save_attention else None
    pipeline = load_base(options.base, options.device)
    share(wanted, shared, pipeline.tokenizer)
    check_guided(options, wanted)
    if figure and not any(entry.subjects for entry in wanted):
        raise ValueError("--save-attention needs a subject; give --box, --layout or --residual")
    rows = [entry for entry in wanted for _ in range(options.count)]
    recorder = Recorder(len(rows))
    with steered(pipeline.unet, *([recorder] if figure else [])):
        pictures = sample(
            pipeline,
            [row.prompt for row in rows],
            [row.concept for row in rows],
            residuals=[row.residuals for row in rows],
            layouts=[row.layout for row in rows],
            layout_guidance=guidance,
            negative_prompt=options.negative_prompt,
            steps=options.steps,
            guidance_scale=guidance_scale(options),
            guidance_rescale=options.guidance_rescale,
            eta=options.eta,
            seeds=[options.seed + k for _ in wanted for k in range(options.count)],
            progress=not options.quiet,
        )
    if figure:
        maps = recorder.maps(latent_size(pipeline, None)).cpu()[:: options.count]
        by_subject = [subject_maps(e, m, pipeline.tokenizer) for e, m in zip(wanted, maps, strict=True)]
        firsts = enumerate(zip(pictures[:: options.count], by_subject, strict=True))
        draw_maps(figure, [(f"prompt {i}", *shown) for i, shown in firsts])
    if options.draw_layout:
        pictures = [drawn(p, row.layout) if row.layout else p for p, row in zip(pictures, rows, strict=True)]
    by_prompt = [
        (entry.prompt, pictures[i * options.count :][: options.count]) for i, entry in enumerate(wanted)
    ]
    save_pictures(output, by_prompt, [f"prompt{i}" for i in range(len(wanted))], options.seed)
    if figure:
        save_figure(figure, maps_file)
        print(maps_file)
