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
log1p(x::Real) = inside(Base.log1p, x, x >= -1)
asin(x::Real) = inside(Base.asin, x, abs(x) <= 1)
acos(x::Real) = inside(Base.acos, x, abs(x) <= 1)
acosh(x::Real) = inside(Base.acosh, x, x >= 1)
atanh(x::Real) = inside(Base.atanh, x, abs(x) <= 1)
sin(x::Real) = inside(Base.sin, x, isfinite(x))
cos(x::Real) = inside(Base.cos, x, isfinite(x))
tan(x::Real) = inside(Base.tan, x, isfinite(x))
pow(x::Real, y::Real) = ifelse((x < 0) & (y != trunc(y)), oftype(x, NaN), abs(x)^y * odd_sign(x, y))
odd_sign(x, y) = ifelse((x < 0) & (rem(y, 2) != 0), -one(x), one(x))
for f in (:exp2, :atan, :sinh, :cosh, :asinh, :abs, :floor, :ceil, :trunc, :copysign, :hypot, :isnan)
    @eval $f(xs::Real...) = Base.$f(xs...)
end
roundeven(x::Real) = Base.round(x)
atan2(y::Real, x::Real) = Base.atan(y, x)
erf(x::Real) = SpecialFunctions.erf(x)
erfc(x::Real) = SpecialFunctions.erfc(x)
sign(x::T) where {T <: Real} = T(x > 0) - T(x < 0)
max(x::Real, y::Real) = ifelse((x > y) | (x != x), x, y)
min(x::Real, y::Real) = ifelse((x < y) | (x != x), x, y)
fmax(x::Real, y::Real) = ifelse((x > y) | (y != y), x, y)
fmin(x::Real, y::Real) = ifelse((x < y) | (y != y), x, y)
fmod(x::Real, y::Real) = Base.rem(x, y)
remainder(x::Real, y::Real) = Base.mod(x, y)
xlogy(x::Real, y::Real) = ifelse((x == 0) & !isnan(y), zero(x), x * log(y))
@inline sigmoid(x::Real) = one(x) / (one(x) + exp(-x))

# exp, expm1 and tanh without branches or tables, so that loops over them become vector code. exp(x) = 2^k exp(r) with
# |r| <= log(2) / 2, k in the low bits of a number so large that adding it rounds (Muller, Elementary Functions, 11.1);
# exp(r) - 1 by Taylor's polynomial, whose remainder is below half a unit in the last place.
shifter(::Type{Float64}) = 0x1.8p52
shifter(::Type{Float32}) = Float32(0x1.8p23)
# log(2) in two parts, the first with so few bits that k times it is exact.
log2_parts(::Type{Float64}) = (0x1.62e42feep-1, 0x1.a39ef35793c76p-33)
log2_parts(::Type{Float32}) = (0.69313812f0, 9.0580006f-6)
taylor(::Type{Float64}) = map(n -> 1 / factorial(n), Tuple(1:13))
taylor(::Type{Float32}) = map(n -> Float32(1 / factorial(n)), Tuple(1:7))

for (T, I, bits, bias) in ((Float64, Int64, 52, 1023), (Float32, Int32, 23, 127))
    coefficients = taylor(T)
    large, (high, low) = shifter(T), log2_parts(T)
    @eval begin
        two_to(k::$I) = reinterpret($T, (k + $(I(bias))) << $bits)
        @inline function split_exponent(x::$T)
            shifted = muladd(x, $(T(1 / Base.log(2))), $large)
            k = reinterpret($I, shifted) - reinterpret($I, $large)
            rounded = shifted - $large
            r = muladd(rounded, $(-low), muladd(rounded, $(-high), x))
            return k, r * Base.evalpoly(r, $coefficients)
        end
        @inline function exp(x::$T)
            x = ifelse(x > $(T(bias + 1)), $(T(bias + 1)), ifelse(x < $(-T(bias + bits)), $(-T(bias + bits)), x))
            k, q = split_exponent(x)
            half = k >> 1
            return (one(x) + q) * two_to(half) * two_to(k - half)
        end
        @inline function expm1(x::$T)
            x = ifelse(x > $(T(bias + 1)), $(T(bias + 1)), ifelse(x < $(-T(bits + 2)), $(-T(bits + 2)), x))
            k, q = split_exponent(x)
            half = k >> 1
            scale = two_to(half) * two_to(k - half)
            return ifelse(k > $bits, (one(x) + q) * two_to(half) * two_to(k - half), muladd(scale, q, scale - one(x)))
        end
        @inline function tanh(x::$T)
            e = expm1(ifelse(abs(x) > $(T(bits)), $(T(bits)), abs(x)) * 2)
            return copysign(e / (e + 2), x)
        end
    end
end

const NAMES = Tuple(
    filter(names(@__MODULE__; all = true)) do name
        isdefined(@__MODULE__, name) && getfield(@__MODULE__, name) isa Function && !startswith(String(name), '#') &&
            name ∉ (:eval, :include, :inside, :odd_sign, :shifter, :log2_parts, :taylor, :two_to, :split_exponent)
    end
)

end

"Numbers at an address, without a length: generated code knows how many there are."
struct Numbers{T}
    address::Ptr{T}
end
Base.@propagate_inbounds Base.getindex(a::Numbers, i::Int) = unsafe_load(a.address, i)
Base.@propagate_inbounds Base.setindex!(a::Numbers, x, i::Int) = unsafe_store!(a.address, x, i)
Base.:+(a::Numbers{T}, i::Int) where {T} = Numbers{T}(a.address + i * sizeof(T))

"The element at an index; 0 is the index of a zero."
Base.@propagate_inbounds pick(a::Numbers{T}, i::Int) where {T} = i == 0 ? zero(T) : a[i]

# Below this many products a call of BLAS costs more than it saves.
const FEW = 8_192

"""
    multiply!(out, m, n, k, a, a1, a2, b, b1, b2, add)

The product of matrices (m, k) and (k, n) to `out`, (m, n) in row-major order, or added to it. `a1` is the step in memory
from row to row of `a`, `a2` that from column to column; one of them is 1, and so for `b`.
"""
@inline function multiply!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    return if m * n * k <= FEW
        multiply_few!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    else
        multiply_many!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    end
end

@inline function multiply_few!(out::Numbers{T}, m, n, k, a, a1, a2, b, b1, b2, add) where {T}
    if b2 == 1 && n > 1
        for i in 0:(m - 1)
            add || for j in 1:n
                out[i * n + j] = zero(T)
            end
            for l in 0:(k - 1)
                x = a[1 + i * a1 + l * a2]
                @simd ivdep for j in 1:n
                    out[i * n + j] = muladd(x, b[l * b1 + j], out[i * n + j])
                end
            end
        end
    else
        for i in 0:(m - 1), j in 0:(n - 1)
            total = zero(T)
            @simd ivdep for l in 0:(k - 1)
                total = muladd(a[1 + i * a1 + l * a2], b[1 + l * b1 + j * b2], total)
            end
            out[1 + i * n + j] = add ? out[1 + i * n + j] + total : total
        end
    end
    return nothing
end

"Of another BLAS, with integers of 32 bits: dgemm, dgemv, sgemm, sgemv; null for Julia's own."
const BORROWED = fill(C_NULL, 4)

"""
    borrow_blas(dgemm, dgemv, sgemm, sgemv)

Multiply matrices in compiled functions by the Fortran functions at these addresses. Those of the library that a field
was written with take as long there as here, round alike, and run on the threads that it was given.
"""
borrow_blas(addresses::Integer...) = (BORROWED .= pointer_to.(addresses); nothing)

@noinline function multiply_many!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    return if BORROWED[1] == C_NULL
        multiply_own!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    else
        multiply_borrowed!(out, m, n, k, a, a1, a2, b, b1, b2, add)
    end
end

for (T, k, gemm, gemv) in ((Float64, 1, :dgemm_, :dgemv_), (Float32, 3, :sgemm_, :sgemv_))
    own(name) = :((BLAS.@blasfunc($name), BLAS.libblastrampoline))
    for (multiply, I, gemm, gemv) in (
            (:multiply_own!, BLAS.BlasInt, own(gemm), own(gemv)),
            (:multiply_borrowed!, Int32, :(BORROWED[$k]), :(BORROWED[$(k + 1)])),
        )
        @eval begin
            # BLAS's matrices are column-major: what lies here in rows is to it the transpose.
            function $multiply(out::Numbers{$T}, m, n, k, a, a1, a2, b, b1, b2, add)
                beta = add ? one($T) : zero($T)
                if m == 1 || n == 1
                    # (rows, k) times a vector
                    x, x1, rows, s1, s2, step = m == 1 ? (b, a, n, b2, b1, a2) : (a, b, m, a1, a2, b1)
                    trans, r, c, ld = s2 == 1 ? ('T', k, rows, s1) : ('N', rows, k, s2)
                    ccall(
                        $gemv, Cvoid,
                        (
                            Ref{UInt8}, Ref{$I}, Ref{$I}, Ref{$T}, Ptr{$T}, Ref{$I}, Ptr{$T}, Ref{$I}, Ref{$T}, Ptr{$T},
                            Ref{$I}, Clong,
                        ),
                        trans, r, c, one($T), x.address, ld, x1.address, step, beta, out.address, 1, 1
                    )
                else
                    transposed_b, ld_b = b2 == 1 ? ('N', b1) : ('T', b2)
                    transposed_a, ld_a = a2 == 1 ? ('N', a1) : ('T', a2)
                    ccall(
                        $gemm, Cvoid,
                        (
                            Ref{UInt8}, Ref{UInt8}, Ref{$I}, Ref{$I}, Ref{$I}, Ref{$T}, Ptr{$T}, Ref{$I}, Ptr{$T}, Ref{$I},
                            Ref{$T}, Ptr{$T}, Ref{$I}, Clong, Clong,
                        ),
                        transposed_b, transposed_a, n, m, k, one($T), b.address, ld_b, a.address, ld_a, beta, out.address,
                        n, 1, 1
                    )
                end
                return nothing
            end
        end
    end
end

"""
    compile(T, text)

The address of a C function of the Julia function in `text`, `f(out, v, u, p, c, w, t)`: it reads and writes `Numbers{T}`
and a time of type `T`, and the C function takes their addresses, and the time as a double.
"""
function compile(::Type{T}, text::AbstractString) where {T}
    m = Module(:Compiled)
    names = [Expr(:(.), name) for name in (:Elementary, :Numbers, :multiply!, :pick)]
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
writes both products, one after the other; then it is of use to a replay alone.

  - `theta`: of `T`, the parameters.
  - `constants`: of `T`, what the functions read besides; `work`: of `T`, room for what they write in between.
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
    theta::Lent
    constants::Lent
    work::Lent
    columns::Lent
    rows::Lent
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
        constants = Vector{T}(c.constants), work = Vector{T}(c.work), pattern
    )
end

"The same field with memory of its own for what changes."
function Base.copy(field::Field{T}) where {T}
    return Field{T}(
        field.n, field.f, field.jac, field.tgrad, field.jvp, field.vjp, field.vjp_p, field.event, copy(field.parameters);
        field.native, constants = copy(field.constants), work = copy(field.work),
        pattern = field.pattern === nothing ? nothing : copy(field.pattern)
    )
end

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

"""
The same field for a solver that is to be compiled for it, if nothing but itself is asked for: explicit methods, without
an adjoint.
"""
function inlined(field::Field{T}) where {T}
    field.native && field.jac == C_NULL && field.vjp == C_NULL || return field
    return Source{T}(field.n, Inlined(COMPILED[field.f], field), field.parameters, field.event)
end
inlined(field) = field
