"""UNets laid out like well-known ones, of eight channels: for tests of how layers are chosen."""

from functools import cache

from diffusers import UNet2DConditionModel

from retour.models.features import unet_features
from retour.models.sites import attention_sites

DOWN, UP = ("DownBlock2D", "UpBlock2D")
CROSS_DOWN, CROSS_UP = ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")

# name: (edge of the latents, down blocks, up blocks, layers per block, transformer layers)
LAYOUTS = {
    "sd1": (64, (CROSS_DOWN,) * 3 + (DOWN,), (UP,) + (CROSS_UP,) * 3, 2, 1),
    "sdxl": (128, (DOWN, CROSS_DOWN, CROSS_DOWN), (CROSS_UP, CROSS_UP, UP), 2, (1, 2, 10)),
    "single": (16, (CROSS_DOWN, DOWN), (UP, CROSS_UP), 1, 1),
    "emoji": (16, (CROSS_DOWN, CROSS_DOWN, DOWN), (UP, CROSS_UP, CROSS_UP), 1, 1),
}


class Layout:
    """As much of a model as the choice of layers asks for."""

    name = "layout"

    def __init__(self, name):
        self.edge, down, up, layers, depth = LAYOUTS[name]
        self.net = UNet2DConditionModel(
            sample_size=self.edge,
            block_out_channels=(8,) * len(down),
            layers_per_block=layers,
            norm_num_groups=4,
            cross_attention_dim=8,
            attention_head_dim=4,
            down_block_types=down,
            up_block_types=up,
            transformer_layers_per_block=depth,
        )

    def feature_sites(self):
        return unet_features(self.net)

    def attention_sites(self):
        net = self.net
        return attention_sites(
            [
                ("down", "down_blocks", net.down_blocks),
                ("mid", "mid_block", net.mid_block),
                ("up", "up_blocks", net.up_blocks),
            ]
        )

    def factors(self):
        """Attention layer -> how much coarser than the latents it is."""
        return {s.name: s.factor for s in self.feature_sites() if s.kind == "attention"}


@cache
def layout(name):
    """One of `LAYOUTS`."""
    return Layout(name)
