"""The functions of the probing Hessian, each with its route on the host and on a device."""

from hf_immunize.spectra.closed_form import SpectralForm
from hf_immunize.spectra.device_forms import (
    device_concentration,
    device_log_kappa,
    device_r_ill,
    device_r_well,
    device_scale_free,
)
from hf_immunize.spectra.small_forms import (
    scale_free,
    single_r_ill,
    single_r_well,
    single_scale_free,
    small_concentration,
    small_log_kappa,
    small_r_ill,
    small_r_well,
)


R_WELL = SpectralForm(small_r_well, device_r_well, single_r_well)
R_ILL = SpectralForm(small_r_ill, device_r_ill, single_r_ill, inverse=True)
# homogeneous in H of the degrees 2 and −2
SCALE_FREE_R_WELL = SpectralForm(
    scale_free(small_r_well, 2), device_scale_free(device_r_well, 2), single_scale_free(single_r_well, 2)
)
SCALE_FREE_R_ILL = SpectralForm(
    scale_free(small_r_ill, -2),
    device_scale_free(device_r_ill, -2),
    single_scale_free(single_r_ill, -2),
    inverse=True,
)
CONCENTRATION = SpectralForm(small_concentration, device_concentration)
LOG_KAPPA = SpectralForm(small_log_kappa, device_log_kappa)
