"""Fitting absorbing chains: by counts, with latent states, per category; and testing the fit."""
