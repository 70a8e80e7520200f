# Vector fields that were written in PyTorch and arrive here as the text of Julia functions.

"""
The functions that generated code calls, for Float32 and Float64: what PyTorch's do, which is NaN where there is no real
value (Base raises an error there), and PyTorch's choice where two conventions exist.
"""
module Elementary

using SpecialFunctions: SpecialFunctions

const Real = Union{Float32, Float64}

# NaN outside of a domain: the function is not called there.
inside(f, x::Real, ok) = ifelse(ok, f(ifelse(ok, x, one(x))), oftype(x, NaN))

sqrt(x::Real) = Base.sqrt_llvm(x)
log(x::Real) = inside(Base.log, x, x >= 0)
log2(x::Real) = inside(Base.log2, x, x >= 0)
log10(x::Real) = inside(Base.log10, x, x >= 0)
asin(x::Real) = inside(Base.asin, x, abs(x) <= 1)
acos(x::Real) = inside(Base.acos, x, abs(x) <= 1)
acosh(x::Real) = inside(Base.acosh, x, x >= 1)
atanh(x::Real) = inside(Base.atanh, x, abs(x) <= 1)
sin(x::Real) = inside(Base.sin, x, isfinite(x))
cos(x::Real) = inside(Base.cos, x, isfinite(x))
tan(x::Real) = inside(Base.tan, x, isfinite(x))
pow(x::Real, y::Real) = ifelse((x < 0) & (y != trunc(y)), oftype(x, NaN), abs(x)^y * odd_sign(x, y))
odd_sign(x, y) = ifelse((x < 0) & (abs(rem(y, 2)) == 1), -one(x), one(x))
for f in (:exp2, :atan, :sinh, :cosh, :asinh, :abs, :floor, :ceil, :trunc, :copysign, :hypot, :isnan)
    @eval $f(xs::Real...) = Base.$f(xs...)
end
roundeven(x::Real) = Base.round(x)
atan2(y::Real, x::Real) = Base.atan(y, x)
erfc(x::Real) = SpecialFunctions.erfc(x)
sign(x::T) where {T <: Real} = T(x > 0) - T(x < 0)
max(x::Real, y::Real) = ifelse((x > y) | (x != x), x, y)
min(x::Real, y::Real) = ifelse((x < y) | (x != x), x, y)
fmax(x::Real, y::Real) = ifelse((x > y) | (y != y), x, y)
fmin(x::Real, y::Real) = ifelse((x < y) | (y != y), x, y)
fmod(x::Real, y::Real) = Base.rem(x, y)
remainder(x::Real, y::Real) = Base.mod(x, y)
xlogy(x::Real, y::Real) = ifelse((x == 0) & !isnan(y), zero(x), x * log(y))

# exp, expm1, tanh and sigmoid without branches or tables, so that loops over them become vector code. exp(x) = 2^k exp(r)
# with |r| <= log(2) / 2, k in the low bits of a number so large that adding it rounds (Muller, Elementary Functions,
# 11.1); exp(r) - 1 = r + r^2 g(r), where g is the polynomial of least relative error of that (Remez's algorithm): 2e-17,
# and 1.3e-8 in single precision. Of packs as of numbers.
shifter(::Type{Float64}) = 0x1.8p52
shifter(::Type{Float32}) = Float32(0x1.8p23)
# log(2) in two parts, the first with so few bits that k times it is exact.
log2_parts(::Type{Float64}) = (0x1.62e42feep-1, 0x1.a39ef35793c76p-33)
log2_parts(::Type{Float32}) = (0.69313812f0, 9.0580006f-6)
# Of g those of even powers, and those of odd ones: two chains.
coefficients(::Type{Float64}) = (
    (
        0x1.0000000000005p-1, 0x1.555555555228ep-5, 0x1.6c16c17ee729ep-10, 0x1.a019a74a6acffp-16, 0x1.28a206986de30p-22,
    ),
    (
        0x1.5555555555539p-3, 0x1.1111111119013p-7, 0x1.a01a0174fa2ebp-13, 0x1.71de88273c65ep-19, 0x1.ae6ba82dbb6d2p-26,
    ),
)
coefficients(::Type{Float32}) = ((0.49999997f0, 0.0416672f0, 0.0013882518f0), (0.16666543f0, 0.0083665475f0))
# Bits behind the point, and the exponent of 1.
bits_and_bias(::Type{Float64}) = 52, 1023
bits_and_bias(::Type{Float32}) = 23, 127

for (T, I) in ((Float64, Int64), (Float32, Int32))
    bits, bias = bits_and_bias(T)
    large = reinterpret(I, shifter(T))
    @eval begin
        two_to(k::$I) = reinterpret($T, (k + $(I(bias))) << $bits)
        "2^k of the integer k that was added to the shifter, if that is a normal number."
        @inline power_of(shifted::$T) = two_to(reinterpret($I, shifted))
        "2^k as two factors: k may be beyond what one can be."
        @inline function halves_of(shifted::$T)
            k = reinterpret($I, shifted) - $large
            half = k >> 1
            return two_to(half), two_to(k - half)
        end
    end
end

@inline chain(x, c::Tuple{T}) where {T} = c[1]
@inline chain(x, c::Tuple) = muladd(x, chain(x, Base.tail(c)), c[1])

"The number k + shifter, k and exp(r) - 1, of scale x = k log(2) + r."
@inline function split_exponent(::Type{T}, x, scale = one(T)) where {T}
    high, low = log2_parts(T)
    shifted = muladd(x, T(scale * 1.4426950408889634), shifter(T))
    k = shifted - shifter(T)
    r = muladd(k, -low, muladd(k, -high, scale == 1 ? x : x * scale))
    square, (even, odd) = r * r, coefficients(T)
    g = muladd(r, chain(square, odd), chain(square, even))
    return shifted, k, muladd(square, g, r)
end
@inline within(x, low, high) = ifelse(high < x, high, ifelse(x < low, low, x))

@inline function exp_of(::Type{T}, x) where {T}
    bits, bias = bits_and_bias(T)
    shifted, _, q = split_exponent(T, within(x, -T(bias + bits), T(bias + 1)))
    a, b = halves_of(shifted)
    return (one(T) + q) * a * b
end
@inline function expm1_of(::Type{T}, x) where {T}
    bits, bias = bits_and_bias(T)
    shifted, k, q = split_exponent(T, within(x, -T(bits + 2), T(bias + 1)))
    a, b = halves_of(shifted)
    scale = a * b
    return ifelse(T(bits) < k, (one(T) + q) * a * b, muladd(scale, q, scale - one(T)))
end
@inline function tanh_of(::Type{T}, x) where {T}
    size, most = abs(x), T(first(bits_and_bias(T)) / 2)  # from there on it is 1
    shifted, _, q = split_exponent(T, ifelse(most < size, most, size), T(2))
    scale = power_of(shifted)
    e = muladd(scale, q, scale - one(T))
    return copysign(e / (e + T(2)), x)
end
"By half of exp(-x), which is a normal number where the result is; and infinite where that is 0."
@inline function sigmoid_of(::Type{T}, x) where {T}
    _, bias = bits_and_bias(T)
    unit, half = T(0.6931471805599453), T(1) / T(2)
    shifted, _, q = split_exponent(T, within(-x, -(bias - 3) * unit, (bias + 2) * unit))
    return half / muladd(one(T) + q, power_of(shifted - one(T)), half)
end

# sin, cos, log, log1p and erf likewise.

# pi / 2 in three parts: x - k pi / 2 is right to a unit in the last place, also where little of x is left (Cody & Waite's
# reduction by fused products; Muller, Elementary Functions, 11.2).
half_pi(::Type{Float64}) = (0x1.921fb54442d18p0, 0x1.1a62633145c07p-54, -0x1.f1976b7ed8fbcp-110)
half_pi(::Type{Float32}) = (1.5707964f0, -4.371139f-8, -1.7151245f-15)
# sin(r) = r + r^3 g(r^2) and cos(r) = 1 - r^2 / 2 + r^4 h(r^2) for |r| <= pi / 4: g and h of FDLIBM 5.3 (k_sin.c, k_cos.c),
# and of Cephes (sinf.c).
sine_coefficients(::Type{Float64}) = (
    (
        -1.66666666666666324348e-1, 8.33333333332248946124e-3, -1.98412698298579493134e-4, 2.75573137070700676789e-6,
        -2.50507602534068634195e-8, 1.58969099521155010221e-10,
    ),
    (
        4.16666666666666019037e-2, -1.38888888888741095749e-3, 2.48015872894767294178e-5, -2.75573143513906633035e-7,
        2.08757232129817482790e-9, -1.13596475577881948265e-11,
    ),
)
sine_coefficients(::Type{Float32}) = (
    (-1.6666654611f-1, 8.3321608736f-3, -1.9515295891f-4), (4.166664568298827f-2, -1.388731625493765f-3, 2.443315711809948f-5)
)
"sin(x + quarters pi / 2). Where numbers are a quarter apart it is NaN: from 2^50 on, in single precision from 2^21 on."
@inline function sine(::Type{T}, x, quarters) where {T}
    large, (a, b, c), (g, h) = shifter(T), half_pi(T), sine_coefficients(T)
    k = muladd(x, T(0x1.45f306dc9c883p-1), large) - large
    r = fma(-k, c, fma(-k, b, fma(-k, a, x)))
    z = r * r
    half = T(0.5) * z
    most = one(T) - half
    sin_r = muladd(z * r, chain(z, g), r)
    cos_r = most + muladd(z * z, chain(z, h), (one(T) - most) - half)
    quarter = k + T(quarters)
    quarter -= T(4) * (muladd(T(0.25), quarter, large) - large)  # -2, ..., 2
    y = ifelse(abs(quarter) == one(T), cos_r, sin_r)
    y = ifelse((abs(quarter) == T(2)) | (quarter == -one(T)), -y, y)
    return ifelse(abs(x) < large / T(6), y, T(NaN))
end
@inline sin_of(::Type{T}, x) where {T} = sine(T, x, 0)
@inline cos_of(::Type{T}, x) where {T} = sine(T, x, 1)
@inline tan_of(::Type{T}, x) where {T} = sine(T, x, 0) / sine(T, x, 1)

"""
Of numbers as integers: the bits of sqrt(1 / 2), and what is added to those of a number to have its exponent change at
sqrt(2); the bits of 2^52 (2^23), in which an integer can be put; and those behind the point.
"""
parts_of(::Type{Float64}) = 0x3fe6a09e667f3bcd, 0x00095f619980c433, 0x4330000000000000, 0x000fffffffffffff
parts_of(::Type{Float32}) = 0x3f3504f3, 0x004afb0d, 0x4b000000, 0x007fffff
"k, as a number, and m of a positive, normal x = 2^k m with sqrt(1/2) <= m < sqrt(2)."
@inline function split_power(x::T) where {T}
    (bits, bias), (root, room, integer, behind) = bits_and_bias(T), parts_of(T)
    i = reinterpret(typeof(root), x) + room
    k = reinterpret(T, (i >>> bits) | integer) - (reinterpret(T, integer) + T(bias))
    return k, reinterpret(T, (i & behind) + root)
end
# log(1 + f) with s = f / (2 + f): FDLIBM 5.3 (e_log.c), FreeBSD (e_logf.c), even and odd powers of s^2.
log_coefficients(::Type{Float64}) = (
    (6.666666666666735130e-1, 2.857142874366239149e-1, 1.818357216161805012e-1, 1.479819860511658591e-1),
    (3.999999999940941908e-1, 2.222219843214978396e-1, 1.531383769920937332e-1),
)
log_coefficients(::Type{Float32}) = ((0.66666662693f0, 0.28498786688f0), (0.40000972152f0, 0.24279078841f0))
"log(2^k m) + rest, where that is small."
@inline function log_sum(::Type{T}, k, m, rest) where {T}
    high, low = log2_parts(T)
    f = m - one(T)
    s = f / (T(2) + f)
    z, half = s * s, T(0.5) * f * f
    w, (even, odd) = z * z, log_coefficients(T)
    tail = muladd(z, chain(w, even), w * chain(w, odd))
    small = muladd(s, half + tail, muladd(k, low, rest))
    return muladd(k, high, f - (half - small))
end
@inline function at_ends(::Type{T}, y, x, least) where {T}
    return ifelse(least < x, ifelse(x < T(Inf), y, x), ifelse(x == least, T(-Inf), T(NaN)))
end
@inline function log_of(::Type{T}, x) where {T}
    room = first(bits_and_bias(T)) + 2
    tiny = x < floatmin(T)
    k, m = split_power(ifelse(tiny, x * T(2)^room, x))
    return at_ends(T, log_sum(T, k - ifelse(tiny, T(room), zero(T)), m, zero(T)), x, zero(T))
end
@inline function log1p_of(::Type{T}, x) where {T}
    u = one(T) + x
    lost = ifelse(x < one(T), x - (u - one(T)), one(T) - (u - x)) / u
    return at_ends(T, log_sum(T, split_power(u)..., lost), x, -one(T))
end

# erf(x) = x + x p(x^2) for |x| < 0.8, else 1 - exp(-x^2) q(t), where t = a / (x + 4) + b goes from 1 to -1 for x from 0.8 to
# where erf is 1. p and q are nearly the polynomials of least error (Chebyshev interpolation): 3e-18 and 1.5e-17, in single
# precision 3e-9 and 7e-9.
erf_near(::Type{Float64}) = (
    0x1.06eba8214db68p-3, -0x1.812746b0379d0p-2, 0x1.ce2f21a0415d1p-4, -0x1.b82ce3120202ep-6, 0x1.565bccf408091p-8,
    -0x1.c02dadf68874dp-11, 0x1.f9a24a046349fp-14, -0x1.f4be03698a515p-17, 0x1.b8b104d075689p-20, -0x1.53e4afad4edc8p-23,
    0x1.7ca7b02008145p-27,
)
erf_near(::Type{Float32}) = (0.12837917f0, -0.37612602f0, 0.1128313f0, -0.02682157f0, 0.0050864755f0, -0.00065435475f0)
"Where erf is 1, a, b, and the coefficients of q."
erf_far(::Type{Float64}) = (
    6.0, 0x1.2762762762762p+4, -0x1.6c4ec4ec4ec4fp+1,
    (
        0x1.b1cc64db8c568p-3, 0x1.5e2e1b84d4417p-3, 0x1.236efdb6e9e20p-4, 0x1.9cf96a1813fa0p-6, 0x1.f04cb011ba747p-8,
        0x1.f3d4cda973395p-10, 0x1.9b8d903923d74p-12, 0x1.072815ec121c4p-14, 0x1.ca0992ce40546p-18,
        0x1.086ded81a7b04p-22, -0x1.22428c54582a8p-24, -0x1.a06c508b4c168p-27, -0x1.35c353a08befap-34,
        0x1.d9ffd3a217b60p-33, 0x1.033bcb63c9aa9p-36, -0x1.c434d322e7d7cp-39,
    ),
)
erf_far(::Type{Float32}) = (
    4.0f0, 24.0f0, -4.0f0,
    (
        0.25539568f0, 0.1601947f0, 0.054007735f0, 0.015163725f0, 0.003540414f0, 0.00068007474f0, 0.00010619747f0,
        1.2073195f-5,
    ),
)
@inline function erf_of(::Type{T}, x) where {T}
    size, (most, a, b, q) = abs(x), erf_far(T)
    size = ifelse(most < size, most, size)
    z = size * size
    near = muladd(size, chain(z, erf_near(T)), size)
    far = one(T) - exp_of(T, -z) * chain(muladd(a, one(T) / (size + T(4)), b), q)
    return copysign(ifelse(size < T(0.8), near, far), x)
end

# atan(x) = x + x^3 p(x^2) for 0 <= x <= 1: p is nearly the polynomial of least error, 3e-17 and 2e-8.
atan_coefficients(::Type{Float64}) = (
    -0x1.5555555555555p-2, 0x1.9999999999620p-3, -0x1.24924924753ecp-3, 0x1.c71c71bb00a6cp-4, -0x1.745d15ee35819p-4,
    0x1.3b1399d1dcdc7p-4, -0x1.110fff599e4d2p-4, 0x1.e1d0239d392a6p-5, -0x1.aebbb1647a168p-5, 0x1.841dcf603a209p-5,
    -0x1.5d02278205cc7p-5, 0x1.3328700bb8169p-5, -0x1.00390504e9f2fp-5, 0x1.843f4bca23369p-6, -0x1.fd0e4de8fed90p-7,
    0x1.123baedb61abdp-7, -0x1.ca3677db66678p-9, 0x1.1325b2f8964bep-10, -0x1.a359b96a4eee4p-13,
    0x1.2f07811f9f6e9p-16,
)
atan_coefficients(::Type{Float32}) = (
    -0.3333333f0, 0.1999974f0, -0.14278568f0, 0.110337645f0, -0.0865688f0, 0.06250169f0, -0.03587154f0, 0.013507771f0,
    -0.0023869972f0,
)
"Of the point (x, y), and of (1, y)."
@inline function atan2_of(::Type{T}, y, x) where {T}
    a, b = abs(y), abs(x)
    high = b < a
    least, most = ifelse(high, b, a), ifelse(high, a, b)
    z = ifelse(least == most, ifelse(least == zero(T), least, one(T)), least / most)  # 0 / 0 and Inf / Inf
    z = ifelse((y != y) | (x != x), T(NaN), z)
    s = z * z
    angle = muladd(z * s, chain(s, atan_coefficients(T)), z)
    angle = ifelse(high, T(pi / 2) - angle, angle)
    return copysign(ifelse(copysign(one(T), x) < zero(T), T(pi) - angle, angle), y)
end
@inline function atan_of(::Type{T}, x) where {T}
    a = abs(x)
    high = one(T) < a
    z = ifelse(high, one(T) / a, a)
    s = z * z
    angle = muladd(z * s, chain(s, atan_coefficients(T)), z)
    return copysign(ifelse(high, T(pi / 2) - angle, angle), x)
end

# |x|^y = exp(y log|x|), with the logarithm and its product as sums of two numbers: what is lost of a product of 700 would be
# 700 units in the last place of its exponential.
@inline function two_sum(a, b)
    sum = a + b
    part = sum - a
    return sum, (a - (sum - part)) + (b - part)
end
"log(2^k m) as such a sum."
@inline function log_parts(::Type{T}, k, m) where {T}
    high, low = log2_parts(T)
    f = m - one(T)
    s = f / (T(2) + f)
    z, half = s * s, T(0.5) * f * f
    w, (even, odd) = z * z, log_coefficients(T)
    tail = muladd(z, chain(w, even), w * chain(w, odd))
    first, lost = two_sum(k * high, f)
    last, more = two_sum(first, muladd(s, half + tail, muladd(k, low, fma(T(-0.5) * f, f, half))) - half)
    return last, lost + more
end
@inline function pow_of(::Type{T}, x, y) where {T}
    size, room = abs(x), first(bits_and_bias(T)) + 2
    tiny = size < floatmin(T)
    k, m = split_power(ifelse(tiny, size * T(2)^room, size))
    high, low = log_parts(T, k - ifelse(tiny, T(room), zero(T)), m)
    product = y * high
    rest = muladd(y, low, fma(y, high, -product))
    bits, bias = bits_and_bias(T)
    shifted, _, q = split_exponent(T, within(product, -T(bias + bits), T(bias + 1)))
    q = ifelse(abs(product) < T(bias), muladd(rest, one(T) + q, q), q)
    a, b = halves_of(shifted)
    power = (one(T) + q) * a * b
    power = ifelse((size == zero(T)) | (size == T(Inf)), ifelse(zero(T) < y, size, one(T) / size), power)
    power = ifelse((x != x) | (y != y), T(NaN), power)
    power = ifelse((y == zero(T)) | (x == one(T)) | ((size == one(T)) & (y == y)), one(T), power)
    odd = abs(y - T(2) * trunc(T(0.5) * y)) == one(T)
    power = ifelse((x < zero(T)) & odd, -power, power)
    return ifelse((x < zero(T)) & (y != trunc(y)), T(NaN), power)
end

for f in (:exp, :expm1, :tanh, :sigmoid, :log1p, :erf)
    @eval @inline $f(x::T) where {T <: Real} = $(Symbol(f, :_of))(T, x)
end
# One number is faster by Base's, which have tables and branches.
for f in (:sin, :cos, :tan, :log, :atan)
    @eval @inline $(Symbol(:loop_, f))(x::T) where {T <: Real} = $(Symbol(f, :_of))(T, x)
end
for f in (:atan2, :pow)
    @eval @inline $(Symbol(:loop_, f))(x::T, y::T) where {T <: Real} = $(Symbol(f, :_of))(T, x, y)
end

const NAMES = Tuple(
    filter(names(@__MODULE__; all = true)) do name
        isdefined(@__MODULE__, name) && getfield(@__MODULE__, name) isa Function && !startswith(String(name), '#') &&
            name ∉ (
                :eval, :include, :inside, :odd_sign, :shifter, :log2_parts, :coefficients, :bits_and_bias, :two_to, :power_of,
                :halves_of, :chain, :split_exponent, :within, :exp_of, :expm1_of, :tanh_of, :sigmoid_of, :half_pi,
                :sine_coefficients, :sine, :sin_of, :cos_of, :tan_of, :parts_of, :split_power, :log_coefficients, :log_sum, :at_ends,
                :log_of, :log1p_of, :erf_near, :erf_far, :erf_of, :atan_coefficients,
                :atan2_of, :atan_of, :two_sum, :log_parts, :pow_of,
            )
    end
)

end

"""
    compile(T, text)

The address of a C function of the Julia function in `text`, `f(out, v, u, p, c, w, t)`: it reads and writes `Numbers{T}`
and a time of type `T`, and the C function takes their addresses, and the time as a double.
"""
function compile(::Type{T}, text::AbstractString) where {T}
    m = Module(:Compiled)
    names = [Expr(:(.), name) for name in (:Elementary, :Numbers, :One, :Start, :multiply!, :small!, :pick)]
    Core.eval(m, Expr(:using, Expr(:(:), Expr(:(.), fullname(PyJLODE)...), names...)))
    imports = [Expr(:(.), name) for name in Elementary.NAMES]
    Core.eval(m, Expr(:using, Expr(:(:), Expr(:(.), fullname(Elementary)...), imports...)))
    f = Core.eval(m, Meta.parseall(text))
    Core.eval(
        m, quote
            function entry(out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Cdouble)
                $f(Numbers(out), Numbers(v), Numbers(u), Numbers(p), Numbers(c), Numbers(w), $T(t))
                return nothing
            end
        end
    )
    address = Core.eval(m, :(@cfunction(entry, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble))))
    COMPILED[address] = f
    return address
end

"The Julia functions of the C functions that `compile` made, by their addresses."
const COMPILED = Dict{Ptr{Cvoid}, Any}()

"""
A field of compiled functions, 0 where there is none. Layout as in C. Where there is a `vjp` and no `vjp_p`, the first
writes both products, one after the other; then it is of use to a replay alone. Where there is a `keep`, that `vjp` is to
find in its work space what `keep` wrote there, `kept` numbers, and leaves it as it is; it writes to as much space as
`work` has behind the products. `keep` gives the value of the field, if it is given an address for that.

  - `theta`: of `T`, the parameters.
  - `constants`: of `T`, what the functions read besides; `work`: of `T`, room for what they write in between.
  - `layers`: each a [`Layer`](@ref), as numbers of Int64.
  - `columns`, `rows`: of Int64, the pattern of a sparse Jacobian as of a `SparseMatrixCSC`; empty for a dense one.
"""
struct CompiledFunctions
    n::Int64
    f::Ptr{Cvoid}
    jac::Ptr{Cvoid}
    tgrad::Ptr{Cvoid}
    jvp::Ptr{Cvoid}
    vjp::Ptr{Cvoid}
    vjp_p::Ptr{Cvoid}
    event::Ptr{Cvoid}
    keep::Ptr{Cvoid}
    kept::Int64
    theta::Lent
    constants::Lent
    work::Lent
    columns::Lent
    rows::Lent
    layers::Lent
end

function Field{T}(c::CompiledFunctions) where {T}
    rows = copy(Vector{Int64}(c.rows))
    pattern = if isempty(rows)
        nothing
    else
        SparseMatrixCSC(c.n, c.n, copy(Vector{Int64}(c.columns)), rows, zeros(T, length(rows)))
    end
    return Field{T}(
        c.n, c.f, c.jac, c.tgrad, c.jvp, c.vjp, c.vjp_p, c.event, Vector{T}(c.theta); native = true,
        constants = Vector{T}(c.constants), work = Vector{T}(c.work), pattern,
        layers = copy(reinterpret(Layer, Vector{Int64}(c.layers))), c.keep, c.kept
    )
end

"The same field with memory of its own for what changes."
function Base.copy(field::Field{T}) where {T}
    return Field{T}(
        field.n, field.f, field.jac, field.tgrad, field.jvp, field.vjp, field.vjp_p, field.event, copy(field.parameters);
        field.native, constants = copy(field.constants), work = copy(field.work),
        pattern = field.pattern === nothing ? nothing : copy(field.pattern), field.layers, field.keep, field.kept
    )
end

"""
Have compiled functions see the values that a field now holds. What calls them otherwise than by a solve (or its adjoint)
does this first.
"""
function prepare!(field::Field)
    GC.@preserve field for layer in field.layers
        held = layer.trained == 1 ? field.parameters : field.constants
        from, to = Numbers(pointer(held)) + layer.from, Numbers(pointer(field.constants)) + layer.to
        transpose!(to, from, layer.rows, layer.columns, layer.step)
    end
    return nothing
end
prepare!(source) = nothing

"Set one of the numbers that a field holds: its parameters, and then its constants."
function set_held!(field::Field, place, value)
    m = length(field.parameters)
    place <= m ? (field.parameters[place] = value) : (field.constants[place - m] = value)
    return nothing
end

const Contiguous{T} = Union{Array{T}, Base.FastContiguousSubArray{T}}

plain(x::Contiguous) = x
plain(x::AbstractArray{T}) where {T} = copyto!(Vector{T}(undef, length(x)), x)
plain(x::SparseMatrixCSC) = nonzeros(x)

"Call a compiled function; `v` is anything where it takes none. All arrays are of `T`, and none of dual numbers."
function native(
        field::Field{T}, f::Ptr{Cvoid}, out::Contiguous{T}, v::Contiguous{T}, u::Contiguous{T}, p::Contiguous{T}, t
    ) where {T}
    # The caller keeps its arguments alive, and so `field` what it holds: to root that anew takes a third of the call.
    GC.@preserve field out v u p begin
        @ccall $f(
            pointer(out)::Ptr{T}, pointer(v)::Ptr{T}, pointer(u)::Ptr{T}, pointer(p)::Ptr{T},
            pointer(field.constants)::Ptr{T}, pointer(field.work)::Ptr{T}, t::Cdouble
        )::Cvoid
    end
    return nothing
end

function native(
        field::Field{T}, f::Ptr{Cvoid}, out::AbstractArray{T}, v::AbstractArray{T}, u::AbstractArray{T},
        p::AbstractArray{T}, t
    ) where {T}
    into = plain(out)
    native(field, f, into, plain(v), plain(u), plain(p), t)
    into === out || out isa SparseMatrixCSC || copyto!(out, into)
    return nothing
end

"A compiled function of a field, by its address."
struct Pointed{T}
    f::Ptr{Cvoid}
    field::Field{T, Vector{T}}
end

@inline function (x::Pointed{T})(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t, w::Ptr{T} = pointer(x.field.work)) where {T}
    (; f, field) = x
    @ccall $f(
        out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, pointer(field.parameters)::Ptr{T}, pointer(field.constants)::Ptr{T},
        w::Ptr{T}, t::Cdouble
    )::Cvoid
    return nothing
end

const Closure{T} = Core.OpaqueClosure{Tuple{Ptr{T}, Ptr{T}, Ptr{T}, Ptr{T}, Ptr{T}, Ptr{T}, Float64}, Nothing}

"A compiled function of a field without the passage from C to Julia, which takes as long as a small function."
struct Direct{T}
    f::Closure{T}
    field::Field{T, Vector{T}}
end

@inline function (x::Direct{T})(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t, w::Ptr{T} = pointer(x.field.work)) where {T}
    (; f, field) = x
    return f(out, v, u, pointer(field.parameters), pointer(field.constants), w, t)
end

"The closures of functions that `compile` made, by their addresses, once they were asked for."
const CLOSURES = Dict{Ptr{Cvoid}, Any}()

"A compiled function of a field as our own loops call it."
function called(field::Field{T}, address::Ptr{Cvoid}) where {T}
    haskey(COMPILED, address) || return Pointed{T}(address, field)
    closure = get!(CLOSURES, address) do
        f = COMPILED[address]
        Core.eval(
            Module(:Closure), quote
                Base.Experimental.@opaque function (
                        out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Float64
                    )
                    $f($(map(x -> :($Numbers($x)), (:out, :v, :u, :p, :c, :w))...), $T(t))
                    return nothing
                end
            end
        )
    end
    return Direct{T}(closure::Closure{T}, field)
end

"A compiled function as Julia's solvers take them, for one that is compiled for it."
struct Inlined{T, F}
    f::F
    field::Field{T, Vector{T}}
end

function (x::Inlined{T})(du::Contiguous{T}, u::Contiguous{T}, p::Contiguous{T}, t) where {T}
    (; f, field) = x
    GC.@preserve field du u p begin
        at = Numbers(pointer(u))
        f(
            Numbers(pointer(du)), at, at, Numbers(pointer(p)), Numbers(pointer(field.constants)),
            Numbers(pointer(field.work)), T(t)
        )
    end
    return nothing
end

@inline function (x::Inlined{T})(out::Ptr{T}, v::Ptr{T}, u::Ptr{T}, t, w::Ptr{T} = pointer(x.field.work)) where {T}
    (; f, field) = x
    at(a::Vector) = Numbers(pointer(a))
    f(Numbers(out), Numbers(v), Numbers(u), at(field.parameters), at(field.constants), Numbers(w), T(t))
    return nothing
end

"""
The same field for a solver that is to be compiled for it, if nothing but itself is asked for: explicit methods, without
an adjoint.
"""
function inlined(field::Field{T}) where {T}
    field.native && field.jac == C_NULL && field.vjp == C_NULL || return field
    return Source{T}(field.n, Inlined(COMPILED[field.f], field), field.parameters, field.event)
end
inlined(field) = field
prepare!(source::Source{T, <:Inlined}) where {T} = prepare!(source.f.field)
