"""Names of the official Mamba layers (state-spaces/mamba) and of VMamba's scan layer, for the systems made of them."""

from gen.nn.mamba import MambaConfig
from gen.pretrained.rules import LINEAR, Rule, Rules, Transform, linear

__all__ = ["DEPTHWISE1D", "DEPTHWISE2D", "mamba_rules", "scan2d_rules"]

# (c, 1, k) <-> (k, c) and (c, 1, k, k) <-> (k, k, c)
DEPTHWISE1D = Transform(lambda a: a[:, 0].T, lambda a: (a.T[:, None],))
DEPTHWISE2D = Transform(lambda a: a[:, 0].transpose(1, 2, 0), lambda a: (a.transpose(2, 0, 1)[:, None],))
_PER_DIRECTION = Transform(lambda a: a.swapaxes(1, 2), lambda a: (a.swapaxes(1, 2),))  # (K, out, in) <-> (K, in, out)


def mamba_rules(config: MambaConfig, official: str = "", ours: str = "") -> Rules:
    """Gives the table of one causal layer; the prefixes end in "." and "/"."""
    conv_bias = [Rule(f"{official}conv1d.bias", f"{ours}conv_bias")] if config.conv_bias else []
    return [
        *linear(f"{official}in_proj", f"{ours}in_proj", config.bias),
        Rule(f"{official}conv1d.weight", f"{ours}conv", DEPTHWISE1D),
        *conv_bias,
        *linear(f"{official}x_proj", f"{ours}x_proj", bias=False),
        Rule(f"{official}dt_proj.weight", f"{ours}dt_proj/kernel", LINEAR),
        Rule(f"{official}dt_proj.bias", f"{ours}dt_bias"),
        Rule(f"{official}A_log", f"{ours}A_log"),
        Rule(f"{official}D", f"{ours}D"),
        *linear(f"{official}out_proj", f"{ours}out_proj", config.bias),
    ]


def scan2d_rules(official: str, ours: str, conv_bias: bool, conv: int = 3) -> Rules:
    """Gives the table of one layer that scans along several directions; a convolution of one pixel is none."""
    kernel = [Rule(f"{official}conv2d.weight", f"{ours}conv", DEPTHWISE2D)] if conv > 1 else []
    bias = [Rule(f"{official}conv2d.bias", f"{ours}conv_bias")] if conv > 1 and conv_bias else []
    return [
        *linear(f"{official}in_proj", f"{ours}in_proj", bias=False),
        *kernel,
        *bias,
        Rule(f"{official}x_proj_weight", f"{ours}x_proj", _PER_DIRECTION),
        Rule(f"{official}dt_projs_weight", f"{ours}dt_proj", _PER_DIRECTION),
        Rule(f"{official}dt_projs_bias", f"{ours}dt_bias"),
        Rule(f"{official}A_logs", f"{ours}A_log"),
        Rule(f"{official}Ds", f"{ours}D"),
        Rule(f"{official}out_norm.weight", f"{ours}norm/scale"),
        Rule(f"{official}out_norm.bias", f"{ours}norm/bias"),
        *linear(f"{official}out_proj", f"{ours}out_proj", bias=False),
    ]
