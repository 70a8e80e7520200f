# What Python will call, compiled ahead for both precisions: loading the package is then all that a first solve waits for.

# A linear field in plain C calling convention, in both precisions, as Python's callbacks are.
for T in (Float32, Float64)
    @eval begin
        function c_field(du::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(du, -unsafe_load(u))
            return Cint(0)
        end
        function c_vjp(out::Ptr{$T}, v::Ptr{$T}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(out, -unsafe_load(v))
            return Cint(0)
        end
        function c_margin(margin::Ptr{Cdouble}, u::Ptr{$T}, t::Cdouble)
            unsafe_store!(margin, Cdouble(unsafe_load(u)) - 0.5)
            return Cint(0)
        end
        c_jacobian(J::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(J, -one($T)); Cint(0))
        c_zero(dT::Ptr{$T}, u::Ptr{$T}, t::Cdouble) = (unsafe_store!(dT, zero($T)); Cint(0))
        # The Jacobian of -u is -1, and what multiplies -1 by a vector does so at v = 1.
        function linear_field(::Type{$T}; event::Bool = false)
            vjp = @cfunction(c_vjp, Cint, (Ptr{$T}, Ptr{$T}, Ptr{$T}, Cdouble))
            return Field{$T}(
                1;
                f = @cfunction(c_field, Cint, (Ptr{$T}, Ptr{$T}, Cdouble)),
                jac = @cfunction(c_jacobian, Cint, (Ptr{$T}, Ptr{$T}, Cdouble)),
                tgrad = @cfunction(c_zero, Cint, (Ptr{$T}, Ptr{$T}, Cdouble)),
                jvp = vjp, vjp, vjp_p = vjp, parameters = 1,
                event = event ? @cfunction(c_margin, Cint, (Ptr{Cdouble}, Ptr{$T}, Cdouble)) : C_NULL
            )
        end
    end
end

"Solve u' = -u, u(0) = 1 over [0, 1] with a field as Python's would be."
function solve_linear(::Type{T}, alg; dense = false, event = false, first_step = 0.0, tolerances = 1) where {T}
    f = linear_field(T; event)
    u0, times, out = ones(T, 1), event ? [0.0, 1.0] : [0.0, 0.5, 1.0], zeros(T, event ? 2 : 3)
    offsets, rtol, atol, none = [0, 1], fill(1.0e-4, tolerances), fill(1.0e-6, tolerances), Float64[]
    GC.@preserve u0 times out offsets rtol atol none begin
        r = Ref(
            Request(
                lend.((u0, out, times, offsets, rtol, atol, none, none, none))..., first_step, 0.0, Inf, 100_000, 0,
                dense, 0
            )
        )
        GC.@preserve r begin
            s, outcome = solve(f, alg, Int64(UInt(pointer_from_objref(r))), nothing)
        end
    end
    return (; s, outcome, times, out)
end

const IMPLICIT = (
    "Rosenbrock23()", "Rodas5P()", "RadauIIA5()", "FBDF()", "KenCarp4()", "Kvaerno5()", "TRBDF2()", "DefaultODEAlgorithm()",
)

@setup_workload begin
    @compile_workload begin
        for text in ("DP5()", "Tsit5()"), T in (Float32, Float64)
            alg = algorithm(text)
            (; s, times, out) = solve_linear(T, alg; dense = true)
            GC.@preserve times out interpolate!(s, Int64(UInt(pointer(times))), Int64(UInt(pointer(out))), 3)
            T == Float64 && solve_linear(T, alg; first_step = 0.1)
            T == Float64 && solve_linear(T, alg; event = true)
        end
        for text in ("BS3()", "DP8()", "Vern7()", "Vern9()", IMPLICIT...)
            solve_linear(Float64, algorithm(text); dense = true)
        end
        for T in (Float32, Float64)
            field(T, 1, 0, 0, 0, 0, 0, 0, 0, 0)
        end
    end
end
