"""The configuration groups of bnnft, for Hydra: `hydra.searchpath: [pkg://bnnft.conf]`."""
