"""Networks trained on real images, their Gabor layer beside the ordinary one."""
