"""What contenders are called in tables and pictures."""

NAMES = {
    "forward": "forward",
    "forward_backward": "forward and backward",
    "relprop": "relprop",
    "relprop_medium": "relprop, medium",
    "relprop_stable": "relprop, chefer_stable",
    "relprop_stable_medium": "relprop, chefer_stable, medium",
    "authors": "the authors' code",
    "relprop_attnlrp": "relprop, attnlrp",
    "relprop_attnlrp_medium": "relprop, attnlrp, medium",
    "relprop_cp_lrp": "relprop, cp_lrp",
    "lxt": "LXT",
    "relprop_zennit": "relprop, EpsilonPlus",
    "zennit": "zennit, EpsilonPlus",
    "grad_cam": "pytorch-grad-cam",
    "captum_gradient_shap": "Captum, GradientShap",
    "relprop_ig": "relprop, integrated gradients",
    "captum_ig": "Captum, integrated gradients",
    "captum_lime": "Captum, LIME",
}
