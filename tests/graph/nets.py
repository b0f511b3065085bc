"""Small networks, each for one thing that a forward may do to its channels."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Forward = Callable[..., object]


class Net(nn.Module):
    """Modules and parameters by name, and a forward that takes them as its first argument."""

    def __init__(self, forward: Forward, **parts: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = forward
        for name, part in parts.items():
            if isinstance(part, nn.Module):
                self.add_module(name, part)
            else:
                self.register_parameter(name, nn.Parameter(part))

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def conv(c_in: int, c_out: int, kernel: int = 1, **options: object) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, kernel, **options)  # type: ignore[arg-type]


def sandwich(middle: Forward, channels: int = 16, c_after: int | None = None, **parts: nn.Module | Tensor) -> Net:
    """A convolution, `middle(net, y)`, a convolution: the middle sees `channels` channels and makes `c_after`."""

    def forward(net: Net, x: Tensor) -> Tensor:
        return net.last(middle(net, F.relu(net.first(x))))

    return Net(forward, first=conv(3, channels, 3, padding=1), last=conv(c_after or channels, 5), **parts)


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions (one grouped), skip connections by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = conv(3, 8, 3, padding=1)
        self.down2 = conv(8, 12, 3, padding=1)
        self.mid = conv(12, 16, 3, padding=1)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, 2)
        self.merge2 = conv(24, 8, 3, padding=1)
        self.up1 = nn.ConvTranspose2d(8, 8, 2, 2, groups=2)
        self.merge1 = conv(16, 8, 3, padding=1)
        self.out = conv(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.down1(x))
        b = F.relu(self.down2(F.max_pool2d(a, 2)))
        y = F.relu(self.mid(F.max_pool2d(b, 2)))
        y = F.relu(self.merge2(torch.cat([self.up2(y), b], 1)))
        y = F.relu(self.merge1(torch.cat([self.up1(y), a], 1)))
        return self.out(y)


class OneD(nn.Module):
    """Signals: grouped, PReLU, a depthwise transposed convolution, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv1d(2, 16, 5), nn.BatchNorm1d(16), nn.PReLU(16), nn.Conv1d(16, 24, 3, groups=4, bias=False),
            nn.PReLU(), nn.ConvTranspose1d(24, 24, 3, groups=24), nn.BatchNorm1d(24), nn.MaxPool1d(2),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(24 * 6, 10), nn.BatchNorm1d(10), nn.Linear(10, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).flatten(1))


class ThreeD(nn.Module):
    """Volumes, with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bn = nn.Conv3d(1, 8, 3, padding=1), nn.BatchNorm3d(8)
        self.inner = nn.Sequential(nn.Conv3d(8, 6, 1), nn.Conv3d(6, 8, 3, padding=1, bias=False), nn.BatchNorm3d(8))
        self.up = nn.ConvTranspose3d(8, 6, 2, stride=2)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn(self.first(x)))
        y = self.up(y + torch.sigmoid(self.inner(y)))
        return self.head(F.adaptive_avg_pool3d(y, 1).view(x.shape[0], -1))


class Residual(nn.Module):
    """`inner` around the activation, with a 1x1 convolution before and after."""

    def __init__(self, inner: nn.Module, c_in: int, c_out: int) -> None:
        super().__init__()
        self.before, self.inner, self.after = conv(3, c_in, 3, padding=1), inner, conv(c_out, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.relu(self.inner(F.silu(self.before(x)))))


def grouped(groups: int, c_in: int = 16, c_out: int = 32, transposed: bool = False) -> nn.Module:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return Residual(nn.Sequential(kind(c_in, c_out, 3, groups=groups), nn.BatchNorm2d(c_out)), c_in, c_out)


def tied_module() -> nn.Module:
    """One convolution under two names, run three times."""
    shared = conv(8, 8, 3, padding=1)

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.one(net.first(x)))
        return net.last(y + F.relu(net.two(y)) + net.one(y))

    return Net(forward, first=conv(3, 8), one=shared, two=shared, last=conv(8, 3))


def tied_parameter() -> nn.Module:
    """One kernel in two convolutions that differ in their bias, one scale in two batch norms."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.norm1(net.one(net.first(x))))
        z = F.relu(net.norm2(net.two(net.second(x))))
        return net.last1(y) + net.last2(z).sigmoid()

    net = Net(
        forward, first=conv(3, 8), second=conv(3, 8), one=conv(8, 12, 3), two=conv(8, 12, 3), norm1=nn.BatchNorm2d(12),
        norm2=nn.BatchNorm2d(12), last1=conv(12, 3), last2=conv(12, 3),
    )  # fmt: skip
    net.two.weight = net.one.weight
    net.norm2.weight = net.norm1.weight
    net.norm2.running_mean = net.norm1.running_mean
    return net


def one_output_channel() -> nn.Module:
    """A spatial gate of one channel, and a bottleneck of one channel."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.relu(net.first(x))
        y = y * torch.sigmoid(net.gate(y))
        return net.last(y) + net.wide(F.relu(net.narrow(y)))

    return Net(forward, first=conv(3, 16, 3), gate=conv(16, 1), last=conv(16, 3), narrow=conv(16, 1), wide=conv(1, 3))


def one_input_channel() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.last(F.relu(net.depth(net.first(x))))

    return Net(forward, first=conv(1, 8, 3), depth=conv(8, 8, 3, groups=8), last=conv(8, 1))


def two_inputs() -> nn.Module:
    def forward(net: Net, x: Tensor, z: Tensor) -> Tensor:
        return net.last(torch.cat([F.relu(net.left(x)), F.relu(net.right(z)), x], 1))

    return Net(forward, left=conv(3, 8, 3, padding=1), right=conv(2, 6, 3, padding=1), last=conv(17, 4))


def nested_outputs() -> nn.Module:
    def forward(net: Net, x: Tensor) -> object:
        y = F.relu(net.first(x))
        z = F.relu(net.second(y))
        return {"logits": net.head(z.mean((2, 3))), "maps": (net.map1(y), [net.map2(z)])}

    return Net(
        forward, first=conv(3, 8, 3), second=conv(8, 12, 3, stride=2), head=nn.Linear(12, 4), map1=conv(8, 2),
        map2=conv(12, 3),
    )  # fmt: skip


def naked_parameters() -> nn.Module:
    """Functional calls: a kernel, a shift, a linear weight and two layer scales that no module owns."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.conv2d(x, net.kernel, net.shift, padding=1)
        y = y + net.gamma * F.relu(net.inner(y)) * net.delta
        return F.linear(F.gelu(y).permute(0, 2, 3, 1), net.table).mean((1, 2))

    torch.manual_seed(3)
    return Net(
        forward, kernel=torch.randn(12, 3, 3, 3), shift=torch.randn(12), gamma=torch.randn(12, 1, 1),
        delta=torch.randn(1, 12, 1, 1), inner=conv(12, 12, 3, padding=1), table=torch.randn(4, 12),
    )  # fmt: skip


def functional_depthwise() -> nn.Module:
    """A depthwise convolution whose groups are read off the tensor."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x)
        return net.last(F.conv2d(F.relu(y), net.kernel, groups=y.shape[1]))

    torch.manual_seed(3)
    return Net(forward, first=conv(3, 12), kernel=torch.randn(12, 1, 3, 3), last=conv(12, 4))


def functional_depthwise_literal() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.last(F.conv2d(F.relu(net.first(x)), net.kernel, groups=12))

    torch.manual_seed(3)
    return Net(forward, first=conv(3, 12), kernel=torch.randn(12, 1, 3, 3), last=conv(12, 4))


def squeeze_excitation(how: str) -> nn.Module:
    def gate(net: Net, y: Tensor) -> Tensor:
        if how == "conv":
            return y * torch.sigmoid(net.up(F.relu(net.down(F.adaptive_avg_pool2d(y, 1)))))
        b, c = y.shape[:2]
        s = torch.sigmoid(net.up(F.relu(net.down(y.mean((2, 3)))))).view(b, c, 1, 1)
        return y * (s.expand_as(y) if how == "expand_as" else s)

    if how == "conv":
        return sandwich(gate, down=conv(16, 6), up=conv(6, 16))
    return sandwich(gate, down=nn.Linear(16, 6), up=nn.Linear(6, 16))


def pixel_shuffle() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = F.pixel_shuffle(F.relu(net.first(x)), 2)
        z = F.pixel_unshuffle(F.relu(net.second(y)), 2)
        return net.last(z)

    return Net(forward, first=conv(3, 24, 3, padding=1), second=conv(6, 8), last=conv(32, 3))


def shuffle(net: Net, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.view(b, 4, c // 4, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_open(net: Net, y: Tensor) -> Tensor:
    b, _, h, w = y.shape
    return y.view(b, 4, -1, h, w).transpose(1, 2).flatten(1, 2)


def shuffle_slots_written(net: Net, y: Tensor) -> Tensor:
    """Wrong after removal without any error: the groups become fewer, not smaller."""
    b, _, h, w = y.shape
    return y.view(b, -1, 4, h, w).transpose(1, 2).flatten(1, 2)


def shuffle_slots_computed(net: Net, y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.view(b, c // 4, 4, h, w).transpose(1, 2).reshape(b, c, h, w)


def shuffle_all_written(net: Net, y: Tensor) -> Tensor:
    b, _, h, w = y.shape
    return y.view(b, 4, 4, h, w).transpose(1, 2).reshape(b, 16, h, w)


def halves_chunked(net: Net, y: Tensor) -> Tensor:
    a, b = y.chunk(2, 1)
    return torch.cat([b, F.relu(a), a * b], 1)


def halves_computed(net: Net, y: Tensor) -> Tensor:
    a, b = y.split(y.shape[1] // 2, 1)
    return torch.cat([b, F.relu(a)], 1)


def halves_written(net: Net, y: Tensor) -> Tensor:
    """Wrong after removal without any error: the halves become 8 and the rest."""
    a, b = y.split(8, 1)
    return torch.cat([b, a], 1)


def uneven_parts(net: Net, y: Tensor) -> Tensor:
    a, b = y.split([10, 6], 1)
    return torch.cat([b, a], 1)


def slice_written(net: Net, y: Tensor) -> Tensor:
    return torch.cat([y[:, :6], y[:, 6:].relu()], 1)


def write_into_zeros(net: Net, y: Tensor) -> Tensor:
    out = torch.zeros_like(y)
    out[:, :, 1:] = y[:, :, :-1]
    out += y
    return out


def write_into_part(net: Net, y: Tensor) -> Tensor:
    out = y.clone()
    out[:, ::2] = F.relu(net.inner(y))
    return out


def instance_statistics_over_groups(net: Net, y: Tensor) -> Tensor:
    """Group norm by hand."""
    return F.instance_norm(y.view(y.shape[0], 4, -1)).view(y.shape)


def channels_last(net: Net, y: Tensor) -> Tensor:
    y = y.permute(0, 2, 3, 1)
    return (y + net.up(F.gelu(net.down(y)))).permute(0, 3, 1, 2)


def pads(net: Net, y: Tensor) -> Tensor:
    y = F.pad(y, (1, 1, 1, 1), mode="reflect")
    y = F.pad(F.pad(y, (1, 0), mode="constant", value=0.5), (1, 1, 0, 1), mode="replicate")
    return F.pad(y, (1, 2, 0, 1), mode="circular")


def copies_of_channels(net: Net, y: Tensor) -> Tensor:
    flat = F.pad(y.flatten(2).transpose(1, 2), (1, 1), mode="reflect")  # pads the channels
    return flat.transpose(1, 2).unflatten(2, y.shape[2:])


def outer_product(net: Net, y: Tensor) -> Tensor:
    a, b = y.mean((2, 3)), net.second(y.mean((2, 3)))
    return (a[:, :, None] * b[:, None, :]).flatten(1)[:, :, None, None]


class TwiceAround(nn.Module):
    """Pads channels by numbers that it keeps, and runs twice."""

    def __init__(self) -> None:
        super().__init__()
        from convpare.blocks.cifar import ZeroPadShortcut

        self.first, self.second, self.third = conv(3, 8, 3, padding=1), conv(8, 12), conv(8, 12)
        self.pad = ZeroPadShortcut(2, 1, 3)
        self.last = conv(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.first(x))
        a = F.relu(self.second(y)[:, :, ::2, ::2] + self.pad(y))
        b = torch.tanh(self.third(y)[:, :, ::2, ::2] + self.pad(y.sigmoid()))
        return self.last(a) + self.last(b)


class Absolute(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.abs()


def parametrized_depthwise() -> nn.Module:
    """The kernel is computed element by element from a parameter that another module owns."""
    depth = nn.utils.parametrize.register_parametrization(conv(12, 12, 3, groups=12, bias=False), "weight", Absolute())
    return Residual(depth, 12, 12)


class PlainTensor(nn.Module):
    """A tensor that is neither parameter nor buffer, beside a shuffle that must be tried out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.half = conv(3, 16), conv(16, 4), torch.full((1, 1, 1, 1), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(shuffle(self, self.first(x) * self.half.to(x)))  # type: ignore[arg-type]


def torch_attention() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.first(x).flatten(2).transpose(1, 2)
        return net.last(y + net.mix(y, y, y, need_weights=False)[0])

    mix = nn.MultiheadAttention(8, 2, batch_first=True)
    return Net(forward, first=conv(3, 8, 2, stride=2), mix=mix, last=nn.Linear(8, 3))


def weight_norm() -> nn.Module:
    def forward(net: Net, x: Tensor) -> Tensor:
        return net.last(F.relu(net.inner(F.relu(net.first(x)))))

    inner = nn.utils.parametrizations.weight_norm(conv(8, 12, 3))
    return Net(forward, first=conv(3, 8), inner=inner, last=conv(12, 4))


class StandardisedConv(nn.Conv2d):
    """A convolution whose kernels have mean 0 and variance 1 for every output channel, times a gain."""

    def __init__(self, *args: int, gain_first: bool = False, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)
        self.gain_first = gain_first

    def forward(self, x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        centred = self.weight - self.weight.mean(axes, keepdim=True)
        kernel = centred / (self.weight.var(axes, unbiased=False, keepdim=True) + 1e-4).sqrt()
        kernel = self.gain * kernel if self.gain_first else kernel * self.gain
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Attention(nn.Module):
    """Self-attention with heads, as vision transformers write it: (B, tokens, channels) to the same."""

    def __init__(self, channels: int, heads: int, how: str = "matmul", scale: float | None = 0.4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.how, self.scale = heads, channels // heads, how, scale
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, n, -1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, heads, tokens, channels of a head)."""
        if self.how == "fused":
            return F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        if self.how == "einsum":
            weights = torch.einsum("bhnd,bhmd->bhnm", q * self.scale, k).softmax(-1)
            return torch.einsum("bhnm,bhmd->bhnd", weights, v)
        if self.how == "scaled by the width":
            return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
        if self.how == "cosine":
            weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) / 0.1).softmax(-1)
            return weights @ v
        return ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v


class BiasedAttention(Attention):
    """With a table of biases by relative position, one column for each head."""

    def __init__(self, channels: int, heads: int, tokens: int) -> None:
        super().__init__(channels, heads)
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, heads))
        place = torch.arange(tokens)
        self.register_buffer("positions", place[:, None] - place[None] + tokens - 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        tokens = q.shape[2]
        bias = self.table[self.positions.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()
        return (q @ k.transpose(-2, -1) * self.scale + bias.unsqueeze(0)).softmax(-1) @ v


class SharedKeys(nn.Module):
    """Attention in which several heads of queries share one of keys and values."""

    def __init__(self, channels: int, heads: int, shared: int, how: str = "repeat_interleave") -> None:
        super().__init__()
        self.heads, self.shared, self.how = heads, shared, how
        width = channels // heads * shared
        self.q, self.k, self.v = nn.Linear(channels, channels), nn.Linear(channels, width), nn.Linear(channels, width)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, -1).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.shared, -1).transpose(1, 2) for layer in (self.k, self.v))
        times = self.heads // self.shared
        if self.how == "enable_gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            y = F.scaled_dot_product_attention(q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))
        return self.proj(y.transpose(1, 2).reshape(b, n, -1))


def tokens(attention: nn.Module, channels: int) -> nn.Module:
    """A stem of `channels` channels and 16 tokens (of 8 × 8 pictures), `attention` around it, a linear head."""

    def forward(net: Net, x: Tensor) -> Tensor:
        y = net.stem(x).flatten(2).transpose(1, 2)
        return net.head((y + net.attention(y)).mean(1))

    return Net(forward, stem=conv(3, channels, 2, stride=2), attention=attention, head=nn.Linear(channels, 3))
