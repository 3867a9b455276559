"""The tolerances that the fixtures' READMEs state, in one place: (fixture, array) patterns -> (rtol, atol).

An array is close when ``|a - b| <= atol + rtol max|b|`` over the whole array. The last matching row counts.
"""

import fnmatch

__all__ = ["TOLERANCES", "tolerance"]

TOLERANCES: list[tuple[str, str, float, float]] = [
    ("*", "*", 1e-4, 1e-5),
    ("dit-forward*", "t_sinusoid", 0.0, 2e-4),  # angles reach 1000 radians: float32 rounding
    ("dit-forward*", "pos_embed", 0.0, 1e-6),
    ("dit-ddpm-losses*", "*schedule_*", 1e-12, 0.0),  # float64 tables
    ("dit-ddpm-sampling*", "*_traj*", 1e-3, 1e-5),  # errors accumulate along a trajectory
    ("dit-ddpm-sampling*", "*_final*", 1e-3, 1e-5),
    ("dit-ddpm-sampling*", "*_pred_xstart*", 1e-3, 1e-5),
    ("dd1-trajectory*", "*", 0.0, 1e-9),  # float64
    ("dd2-conditional-score*", "*", 1e-9, 1e-9),  # float64
    ("edm2-phema*", "*", 1e-6, 0.0),  # float64 formulas
    ("frechet-distance*", "*", 1e-7, 1e-6),  # against 60-digit values
    ("frechet-distance*", "*_cleanfid", 1e-4, 1e-3),  # its matrix square root is off in singular cases
    ("mamba-selective-scan*", "large_grad_*", 1e-3, 1e-5),
    ("guidance-cfg-variants*", "*", 0.0, 1e-5),
    ("precision-recall*", "*_radii_sq_*", 1e-4, 1e-4),
    ("precision-recall*", "*_max_realism_sq_fake", 1e-4, 0.0),
    ("lightningdit-sampling*", "*_traj", 1e-3, 0.0),
    ("lightningdit-latent-cache*", "*", 1e-5, 0.0),
    ("sit-sampling*", "[os]de_*", 1e-3, 0.0),  # of the largest magnitude along a trajectory
    ("repa-alignment*", "[os]de_*", 1e-3, 0.0),
    ("min-snr-weights*", "*", 1e-5, 0.0),
    ("min-snr-weights*", "*.u", 0.0, 1e-6),  # densities
    ("inception-score*", "*", 1e-6, 0.0),
    ("kid*", "*", 1e-9, 1e-14),  # against float64 values
    ("kid*", "kid_cleanfid", 1e-4, 1e-6),
    ("kid*", "kid_torch_fidelity_mean", 1e-4, 1e-6),
    ("kid*", "kid_torch_fidelity_std", 1e-4, 1e-6),
    ("kid*", "mind", 1e-5, 0.0),
    ("cleanfid-resize*", "*", 0.0, 1e-2),  # grey levels
    ("psnr-ssim*", "*", 1e-5, 0.0),
    ("clip-towers*", "*", 0.0, 5e-5),
    ("dinov2-forward*", "*/pos_embed_used", 1e-5, 0.0),
    ("lpips-vgg*", "grad_*", 1e-3, 0.0),
    ("vavae-vf-loss*", "grad_*", 1e-3, 0.0),
    ("detok-autoencoder*", "*", 1e-4, 0.0),
    ("rae-autoencoder*", "*", 1e-4, 0.0),
    ("titok-vq-losses*", "*", 1e-5, 1e-6),
    ("binary-quantizer*", "*", 1e-5, 0.0),
    ("lite-features*", "*", 1e-4, 0.0),
    ("patchgan*", "grad_*", 1e-3, 0.0),
    ("lecam*", "*", 1e-5, 0.0),
    ("titok-schedules*", "*", 1e-6, 0.0),
    ("vavae-diagonal-gaussian*", "*", 1e-5, 0.0),
    ("vavae-diagonal-gaussian*", "kl*_to_other", 1e-4, 0.0),
    ("vavae-training-loss*", "*/*", 1e-4, 0.0),
    ("vavae-training-loss*", "*/g_loss", 0.0, 1e-5),  # means that nearly cancel
    ("vavae-training-loss*", "*/logits_*", 0.0, 1e-5),
    ("vavae-training-loss*", "*/[dv]*_weight", 1e-3, 0.0),
    ("vavae-training-loss*", "*/grad_*", 1e-3, 0.0),
    ("flextok-decode-sampling*", "latents_*", 2e-4, 0.0),
    ("flextok-decode-sampling*", "guidance_*", 0.0, 1e-5),
    ("flextok-embeddings*", "*", 0.0, 1e-5),
    ("flextok-embeddings*", "time_freq_*", 0.0, 1e-4),  # sines of arguments up to 1000
    ("flextok-embeddings*", "time_emb_*", 0.0, 1e-4),
    ("flextok-flow-noise*", "*", 0.0, 1e-5),
    ("flextok-nested-dropout*", "grad_*", 1e-6, 0.0),
    ("maskgit-masking-and-loss*", "*", 1e-5, 0.0),
    ("mar-*", "*", 1e-4, 0.0),
    ("mar-diffloss*", "vb_*", 1e-3, 0.0),
    ("mar-diffloss*", "loss*", 1e-3, 0.0),
    ("mar-forward*", "gen_latent", 3e-5, 0.0),
    ("ar-sampling-var*", "*", 0.0, 1e-6),
    ("flextok-ar-sampling*", "*", 0.0, 1e-5),
    ("instella-ar*", "*", 1e-4, 0.0),
    ("instella-diffusion*", "*", 1e-4, 0.0),
    ("binary-latent-diffusion*", "*_focal*", 1e-3, 0.0),  # of clamped probabilities
    ("progressive-distillation*", "*", 1e-3, 0.0),
    ("progressive-distillation*", "*_mse", 2e-3, 0.0),  # their log-SNR at the noise end is rounded to float32
    ("progressive-distillation*", "*_loss_per_sample", 2e-3, 0.0),
    ("guided-distillation*", "*x_target", 1e-3, 0.0),
    ("meanflow-loss*", "*_grad.*", 1e-3, 0.0),
    ("meanflow-loss*", "*_du_dt", 1e-3, 0.0),
    ("difffit*", "grad.*", 1e-3, 0.0),  # one rounding of x moves them by 6e-5, the embedding's by 7e-4 of the largest
    ("fdloss-fdr*", "*", 1e-9, 0.0),  # float64
    ("autodiffusion-respacing*", "*", 1e-9, 0.0),  # float64
    ("diffusion-features-pool*", "*", 1e-6, 0.0),
    ("internal-guidance*", "*", 1e-4, 0.0),
    ("internal-guidance*", "sample_*", 5e-4, 0.0),  # the last step of a data prediction divides by the time
    ("fsq*", "*", 0.0, 1e-5),
    ("fsq*", "*_grad_z", 1e-5, 1e-7),  # tiny near saturation
]


def tolerance(fixture: str, array: str) -> tuple[float, float]:
    """(rtol, atol) for an array of a fixture."""
    rows = [r for r in TOLERANCES if fnmatch.fnmatchcase(fixture, r[0]) and fnmatch.fnmatchcase(array, r[1])]
    return rows[-1][2], rows[-1][3]
