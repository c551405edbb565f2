"""`python -m anomaly_vae`, also under torchrun."""

from anomaly_vae.cli import main

main()
