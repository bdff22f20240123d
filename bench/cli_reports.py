"""The commands that judge many layers together, and that write the README."""
