"""Devices whose compiler takes the references: one file each."""
