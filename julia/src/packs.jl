# Eight systems in the lanes of one vector: generated functions and solvers that compute with all of them at once.

"How many systems there are side by side: the numbers of a vector register of AVX-512, or of two of AVX2."
const WIDTH = 8

"A number of each system."
struct Pack{T}
    v::NTuple{WIDTH, VecElement{T}}
end

"A truth value of each system."
struct Mask
    v::NTuple{WIDTH, VecElement{UInt8}}
end

const Plural{T} = NTuple{WIDTH, VecElement{T}}

Pack{T}(x::Number) where {T} = Pack{T}(ntuple(_ -> VecElement{T}(T(x)), Val(WIDTH)))
Pack{T}(x::Pack{T}) where {T} = x
Mask(x::Bool) = Mask(ntuple(_ -> VecElement(UInt8(x)), Val(WIDTH)))
Mask(x::Mask) = x
Base.eltype(::Type{Pack{T}}) where {T} = T
@inline Base.getindex(x::Pack, w::Int) = x.v[w].value
@inline Base.getindex(x::Mask, w::Int) = x.v[w].value != 0x00

"A function of single numbers, lane by lane."
@inline each(f, xs::Pack{T}...) where {T} = Pack{T}(ntuple(w -> VecElement{T}(f(map(x -> x[w], xs)...)), Val(WIDTH)))

for (T, name, bits) in ((Float64, "double", "f64"), (Float32, "float", "f32"))
    V = "<$WIDTH x $name>"
    for (op, instruction) in ((:+, "fadd"), (:-, "fsub"), (:*, "fmul"), (:/, "fdiv"))
        code = "%3 = $instruction contract $V %0, %1\nret $V %3"
        @eval @inline function Base.$op(x::Pack{$T}, y::Pack{$T})
            return Pack{$T}(Base.llvmcall($code, Plural{$T}, Tuple{Plural{$T}, Plural{$T}}, x.v, y.v))
        end
    end
    code = "%2 = fneg $V %0\nret $V %2"
    @eval @inline Base.:-(x::Pack{$T}) = Pack{$T}(Base.llvmcall($code, Plural{$T}, Tuple{Plural{$T}}, x.v))
    for (op, test) in ((:<, "olt"), (:<=, "ole"), (:(==), "oeq"), (:!=, "une"))
        code = "%3 = fcmp $test $V %0, %1\n%4 = zext <$WIDTH x i1> %3 to <$WIDTH x i8>\nret <$WIDTH x i8> %4"
        @eval @inline function Base.$op(x::Pack{$T}, y::Pack{$T})
            return Mask(Base.llvmcall($code, Plural{UInt8}, Tuple{Plural{$T}, Plural{$T}}, x.v, y.v))
        end
    end
    code = "%4 = trunc <$WIDTH x i8> %0 to <$WIDTH x i1>\n%5 = select <$WIDTH x i1> %4, $V %1, $V %2\nret $V %5"
    @eval @inline function Base.ifelse(m::Mask, x::Pack{$T}, y::Pack{$T})
        return Pack{$T}(Base.llvmcall($code, Plural{$T}, Tuple{Plural{UInt8}, Plural{$T}, Plural{$T}}, m.v, x.v, y.v))
    end
    @eval @inline function Base.muladd(x::Pack{$T}, y::Pack{$T}, z::Pack{$T})
        return Pack{$T}(
            ccall($("llvm.fmuladd.v$WIDTH$bits"), llvmcall, Plural{$T}, (Plural{$T}, Plural{$T}, Plural{$T}), x.v, y.v, z.v)
        )
    end
    @eval @inline function Base.fma(x::Pack{$T}, y::Pack{$T}, z::Pack{$T})
        return Pack{$T}(
            ccall($("llvm.fma.v$WIDTH$bits"), llvmcall, Plural{$T}, (Plural{$T}, Plural{$T}, Plural{$T}), x.v, y.v, z.v)
        )
    end
    for (f, intrinsic) in (
            (:sqrt, "sqrt"), (:abs, "fabs"), (:floor, "floor"), (:ceil, "ceil"), (:trunc, "trunc"), (:roundeven, "rint"),
        )
        @eval @inline function Elementary.$f(x::Pack{$T})
            return Pack{$T}(ccall($("llvm.$intrinsic.v$WIDTH$bits"), llvmcall, Plural{$T}, (Plural{$T},), x.v))
        end
    end
    @eval @inline function Elementary.copysign(x::Pack{$T}, y::Pack{$T})
        return Pack{$T}(
            ccall($("llvm.copysign.v$WIDTH$bits"), llvmcall, Plural{$T}, (Plural{$T}, Plural{$T}), x.v, y.v)
        )
    end
end
for (op, instruction) in ((:&, "and"), (:|, "or"), (:!=, "xor"))
    code = "%3 = $instruction <$WIDTH x i8> %0, %1\nret <$WIDTH x i8> %3"
    @eval @inline function Base.$op(x::Mask, y::Mask)
        return Mask(Base.llvmcall($code, Plural{UInt8}, Tuple{Plural{UInt8}, Plural{UInt8}}, x.v, y.v))
    end
end
@inline Base.:!(x::Mask) = x != Mask(true)
@inline Base.:(==)(x::Mask, y::Mask) = !(x != y)
@inline Base.ifelse(m::Mask, x::Mask, y::Mask) = (m & x) | (!m & y)

# With a number that all have.
for op in (:+, :-, :*, :/, :<, :<=, :(==), :!=)
    @eval @inline Base.$op(x::Pack{T}, y::Number) where {T} = $op(x, Pack{T}(y))
    @eval @inline Base.$op(x::Number, y::Pack{T}) where {T} = $op(Pack{T}(x), y)
end
for op in (:&, :|, :(==), :!=)
    @eval @inline Base.$op(x::Mask, y::Bool) = $op(x, Mask(y))
    @eval @inline Base.$op(x::Bool, y::Mask) = $op(Mask(x), y)
end
@inline Base.ifelse(m::Mask, x::Bool, y::Bool) = ifelse(m, Mask(x), Mask(y))
@inline Base.ifelse(m::Mask, x::Mask, y::Bool) = ifelse(m, x, Mask(y))
@inline Base.ifelse(m::Mask, x::Bool, y::Mask) = ifelse(m, Mask(x), y)
@inline Base.ifelse(m::Mask, x::Pack{T}, y::Number) where {T} = ifelse(m, x, Pack{T}(y))
@inline Base.ifelse(m::Mask, x::Number, y::Pack{T}) where {T} = ifelse(m, Pack{T}(x), y)
# Neither is known to be of a type but by itself: a literal.
@inline Base.ifelse(m::Mask, x::T, y::T) where {T <: Union{Float32, Float64}} = ifelse(m, Pack{T}(x), Pack{T}(y))
const Single = Union{Number, Pack}
@inline Base.muladd(x::Pack{T}, y::Single, z::Single) where {T} = muladd(x, Pack{T}(y), Pack{T}(z))
@inline Base.muladd(x::Number, y::Pack{T}, z::Single) where {T} = muladd(Pack{T}(x), y, Pack{T}(z))
@inline Base.muladd(x::Number, y::Number, z::Pack{T}) where {T} = muladd(Pack{T}(x), Pack{T}(y), z)
@inline Base.fma(x::Pack{T}, y::Number, z::Pack{T}) where {T} = fma(x, Pack{T}(y), z)

# What PyTorch's functions are, as in `Elementary`: first those without branches.
@inline Elementary.max(x::Pack, y::Pack) = ifelse((y < x) | (x != x), x, y)
@inline Elementary.min(x::Pack, y::Pack) = ifelse((x < y) | (x != x), x, y)
@inline Elementary.fmax(x::Pack, y::Pack) = ifelse((y < x) | (y != y), x, y)
@inline Elementary.fmin(x::Pack, y::Pack) = ifelse((x < y) | (y != y), x, y)
@inline Elementary.isnan(x::Pack) = x != x
@inline Elementary.sign(x::Pack{T}) where {T} = ifelse(zero(T) < x, one(T), zero(T)) - ifelse(x < zero(T), one(T), zero(T))
for f in (:max, :min, :fmax, :fmin, :copysign, :fmod, :remainder, :xlogy, :atan2, :hypot, :pow)
    @eval @inline Elementary.$f(x::Pack{T}, y::Number) where {T} = Elementary.$f(x, Pack{T}(y))
    @eval @inline Elementary.$f(x::Number, y::Pack{T}) where {T} = Elementary.$f(Pack{T}(x), y)
end
for f in (:fmod, :remainder, :xlogy, :hypot)
    @eval @inline Elementary.$f(x::Pack, y::Pack) = each(Elementary.$f, x, y)
end
for f in (:log2, :log10, :asin, :acos, :acosh, :atanh, :exp2, :sinh, :cosh, :asinh, :erfc)
    @eval @inline Elementary.$f(x::Pack) = each(Elementary.$f, x)
end

# Those that loops are vectorised over by the formulas of `Elementary`.
for (T, name, I) in ((Float64, "double", "i64"), (Float32, "float", "i32"))
    V, N = "<$WIDTH x $name>", "<$WIDTH x $I>"
    bits, bias = Elementary.bits_and_bias(T)
    all(i) = "<" * join(fill("$I $i", WIDTH), ", ") * ">"
    # What `Elementary.two_to` and `Elementary.halves_of` do.
    power(k) = "%e = add $N $k, $(all(bias))\n%b = shl $N %e, $(all(bits))\n%x = bitcast $N %b to $V\nret $V %x"
    whole = "%i = bitcast $V %0 to $N\n" * power("%i")
    halves = """
        %i = bitcast $V %0 to $N
        %k = sub $N %i, $(all(reinterpret(T == Float64 ? Int64 : Int32, Elementary.shifter(T))))
        %half = ashr $N %k, $(all(1))
        %other = sub $N %k, %half
    """
    first_half, second_half = halves * power("%half"), halves * power("%other")
    # What `Elementary.split_power` does.
    root, room, integer, behind = map(x -> all(signed(x)), Elementary.parts_of(T))
    moved = "%i = bitcast $V %0 to $N\n%j = add $N %i, $room\n"
    exponent = moved * "%e = lshr $N %j, $(all(bits))\n%k = or $N %e, $integer\n%x = bitcast $N %k to $V\nret $V %x"
    significand = moved * "%s = and $N %j, $behind\n%m = add $N %s, $root\n%x = bitcast $N %m to $V\nret $V %x"
    unit = reinterpret(T, Elementary.parts_of(T)[3]) + T(bias)
    call(code) = :(Pack{$T}(Base.llvmcall($code, Plural{$T}, Tuple{Plural{$T}}, x.v)))
    @eval begin
        @inline Elementary.power_of(x::Pack{$T}) = $(call(whole))
        @inline Elementary.halves_of(x::Pack{$T}) = $(call(first_half)), $(call(second_half))
        @inline Elementary.split_power(x::Pack{$T}) = $(call(exponent)) - $unit, $(call(significand))
    end
end
for f in (:exp, :expm1, :tanh, :sigmoid, :sin, :cos, :tan, :log, :log1p, :erf, :atan)
    @eval @inline Elementary.$f(x::Pack{T}) where {T} = Elementary.$(Symbol(f, :_of))(T, x)
end
for f in (:atan2, :pow)
    @eval @inline Elementary.$f(x::Pack{T}, y::Pack{T}) where {T} = Elementary.$(Symbol(f, :_of))(T, x, y)
end
for f in (:sin, :cos, :tan, :log, :atan, :atan2, :pow)
    @eval @inline Elementary.$(Symbol(:loop_, f))(x...) = Elementary.$f(x...)
end

"Numbers of each system, one after the other, at an address: number i of system w is `(i - 1) WIDTH + w`."
struct PackNumbers{T}
    address::Ptr{T}
end
@inline function Base.getindex(x::PackNumbers{T}, i::Integer) where {T}
    return Pack{T}(unsafe_load(Ptr{Plural{T}}(x.address), i))
end
@inline function Base.setindex!(x::PackNumbers{T}, y, i::Integer) where {T}
    return unsafe_store!(Ptr{Plural{T}}(x.address), Pack{T}(y).v, i)
end
Base.:+(x::PackNumbers{T}, i::Integer) where {T} = PackNumbers{T}(x.address + i * WIDTH * sizeof(T))

"""
    compile_packed(T, text)

As [`compile`](@ref), for eight systems: the address of a C function whose arrays are `PackNumbers{T}`, and whose time is
the address of eight of `T`.
"""
function compile_packed(::Type{T}, text::AbstractString) where {T}
    m = Module(:CompiledPacked)
    Core.eval(m, Expr(:using, Expr(:(:), Expr(:(.), fullname(PyJLODE)...), Expr(:(.), :PackNumbers))))
    imports = [Expr(:(.), name) for name in Elementary.NAMES]
    Core.eval(m, Expr(:using, Expr(:(:), Expr(:(.), fullname(Elementary)...), imports...)))
    f = Core.eval(m, Meta.parseall(text))
    Core.eval(
        m, quote
            function entry(out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, p::Ptr{$T}, c::Ptr{$T}, w::Ptr{$T}, t::Ptr{$T})
                $f(
                    PackNumbers(out), PackNumbers(v), PackNumbers(u), PackNumbers(p), PackNumbers(c), PackNumbers(w),
                    PackNumbers(t)[1]
                )
                return nothing
            end
        end
    )
    return Core.eval(m, :(@cfunction(entry, Cvoid, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}, Ptr{$T}))))
end
